"""Parity of what deformable detectors do with tokens: levels, encoder, selection, proposals.

Selections and proposals are compared as sets; everything after them is put into the reference's
order, since near ties may come the other way round.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from models.deformable_attention import DeformableAttention
from models.detector import Detector
from models.proposals import best_proposals
from models.selection_losses import correlation, decoder_attention_map, most_read
from models.structures import (
    DetectorOutput,
    Images,
    Memory,
    SampledAttention,
    TokenPredictions,
    TokenSelection,
)
from models.transformer import Cells
from tests.parity.case import OUTPUT_TOLERANCE, Case, Finding, compare, compare_values

Order = Tensor | None
"""(batch, entries): for each entry of the reference our number of it; None for the same order."""

_CORNER = (slice(0, 6), slice(0, 3), slice(0, 3))
_SHOWN = 24
"""Tokens whose class logits are stored in full."""


class TokenWatch:
    """Takes down what enters the encoder, where its layers look, and the projected levels."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.maps: list[Tensor] = []
        self.looks: list[SampledAttention] = []
        self._cells: Cells | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "TokenWatch":
        def take_cells(_: nn.Module, given: tuple[object, ...]) -> None:
            cells = given[0]
            assert isinstance(cells, Cells)
            self._cells = cells

        def take_map(_: nn.Module, given: object, said: Tensor) -> None:
            self.maps.append(said)

        def take_look(
            attention: nn.Module,
            given: tuple[Tensor, Tensor, Tensor, tuple[tuple[int, int], ...]],
        ) -> None:
            assert isinstance(attention, DeformableAttention)
            queries, references, _, shapes = given
            self.looks.append(attention.looked_at(queries, references, shapes))

        detector = self.detector
        assert isinstance(detector.input_projections, nn.ModuleList)
        self._handles = [
            detector.encoder.register_forward_pre_hook(take_cells),
            *(level.register_forward_hook(take_map) for level in detector.input_projections),
            *(
                part.register_forward_pre_hook(take_look)
                for part in detector.encoder.modules()
                if isinstance(part, DeformableAttention)
            ),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def cells(self) -> Cells:
        assert self._cells is not None
        return self._cells


def proposal_order(
    case: Case, model: Detector, memory: Memory
) -> tuple[Order, tuple[Finding, ...]]:
    """The queries that are proposals: the reference's order, and whether they are the same."""
    name = "proposal_topk_indices"
    if memory.proposals is None or name not in case.arrays:
        return None, ()
    scores = model.proposal_scores(memory.proposals)
    return _order(case, name, best_proposals(scores, model.settings.num_queries))


def selection_order(case: Case, memory: Memory) -> tuple[Order, tuple[Finding, ...]]:
    """The tokens that the encoder updates: the reference's order, and whether they are the same."""
    name = "sparse_topk_indices"
    if memory.selection is None or name not in case.arrays:
        return None, ()
    return _order(case, name, memory.selection.indices)


def reordered_tokens(said: TokenPredictions, order: Order) -> TokenPredictions:
    """What tokens say, in the reference's order."""
    if order is None:
        return said
    rows = torch.arange(len(order))[:, None]
    return TokenPredictions(said.logits[rows, order], said.boxes[rows, order])


def compare_cells(
    case: Case, model: Detector, images: Images, watch: TokenWatch, memory: Memory
) -> Iterator[Finding]:
    """From the CNN to the encoder's output."""
    group = "intermediates"
    with torch.no_grad():
        levels = model.backbone.levels(images.pixels, model.settings.backbone_levels)
    for name, values in (
        ("backbone_mean", [one.mean((1, 2, 3)) for one in levels]),
        ("backbone_std", [one.std((1, 2, 3)) for one in levels]),
        ("input_proj_mean", [one.mean((1, 2, 3)) for one in watch.maps]),
        ("input_proj_std", [one.std((1, 2, 3)) for one in watch.maps]),
    ):
        yield from compare(group, name, torch.stack(values), case)
    for number, one in enumerate(levels):
        yield from compare(group, f"backbone_level{number}_corner", one[:, *_CORNER], case)
    shapes = np.array(memory.spatial_shapes)
    yield from compare(group, "spatial_shapes", shapes, case, 0)
    yield from compare(group, "padding_mask", memory.padding, case, 0)
    yield from compare(group, "valid_ratios", memory.valid_ratios.flip(-1), case)
    yield from compare(group, "encoder_input_first8", watch.cells.tokens[:, :8], case)
    sines = watch.cells.position - _level_embeddings(model, memory)
    yield from compare(group, "position_first8", sines[:, :8], case)
    tokens = memory.tokens
    for name, part in (
        ("encoder_memory_first8", tokens[:, :8]),
        ("encoder_memory_last4", tokens[:, -4:]),
        ("encoder_memory_mean", tokens.mean((1, 2))),
        ("encoder_memory_std", tokens.std((1, 2))),
    ):
        yield from compare(group, name, part, case)
    yield from _compare_sums(case, group, "encoder_memory_token_sum", tokens.abs())


def compare_proposals(case: Case, model: Detector, memory: Memory) -> Iterator[Finding]:
    """What every token proposes after the encoder, and how it is ranked."""
    if memory.proposals is None:
        return
    yield from compare("outputs", "enc_pred_logits", memory.proposals.logits, case)
    yield from compare("outputs", "enc_pred_boxes", memory.proposals.boxes, case)
    scores = model.proposal_scores(memory.proposals)
    yield from compare("outputs", "proposal_scores", scores, case)


def compare_encoder_heads(case: Case, memory: Memory, selected: Order) -> Iterator[Finding]:
    """What the updated tokens say after each encoder layer."""
    for number, said in enumerate(memory.encoder_layers):
        name, ordered = f"aux_enc_{number}_pred_", reordered_tokens(said, selected)
        yield from compare("encoder heads", f"{name}boxes", ordered.boxes, case)
        logits = ordered.logits
        yield from compare("encoder heads", f"{name}logits_first{_SHOWN}", logits[:, :_SHOWN], case)
        yield from _compare_sums(case, "encoder heads", f"{name}logits_sum", logits)
        yield from compare("encoder heads", f"{name}logits_max", logits.amax(-1), case)


def compare_selection(
    case: Case, watch: TokenWatch, output: DetectorOutput, selected: Order
) -> Iterator[Finding]:
    """Scores and counts of the selected tokens, where they look, and the decoder's map."""
    memory = output.memory
    for name, values in (
        ("sampling_locations_enc_first2", [look.locations for look in watch.looks]),
        ("attention_weights_enc_first2", [look.weights for look in watch.looks]),
    ):
        yield from compare("selection", name, _first(values, selected), case)
    if memory.selection is None or memory.selection.scores is None:
        return
    counts = memory.selection.kept.sum(1)
    if "sparse_token_nums" in case.arrays:
        # At rho = 1 the reference counts one more than there are tokens.
        expected = np.minimum(case.arrays["sparse_token_nums"], memory.selection.kept.shape[1])
        yield compare_values("selection", "sparse_token_nums", counts, expected, 0)
    scores = memory.selection.scores
    shown = torch.where(memory.padding, scores.amin(), scores)
    yield from compare("selection", "mask_prediction", shown, case)
    attention_map = decoder_attention_map(output, legacy_dam=True)
    assert attention_map is not None
    if "dam" in case.arrays:
        expected = case.arrays["dam"]
        yield compare_values("selection", "dam", attention_map, expected, OUTPUT_TOLERANCE, 1.0)
    if "dam_target" in case.arrays:
        wanted = most_read(attention_map, memory.padding, memory.selection)
        odd = wanted.numpy() != (case.arrays["dam_target"] != 0)
        yield Finding("selection", float(odd.sum()), 0, "dam_target")
    shares = [_corr(attention_map, memory, picture) for picture in range(len(counts))]
    yield from compare("selection", "corr", torch.stack(shares, dim=1), case)


def _corr(attention_map: Tensor, memory: Memory, picture: int) -> Tensor:
    """Corr of one picture, over all levels and of each."""
    assert memory.selection is not None
    here = slice(picture, picture + 1)
    selection = memory.selection
    alone = TokenSelection(selection.indices[here], selection.kept[here], None)
    of_picture = Memory(
        tokens=memory.tokens[here],
        position=memory.position[here],
        padding=memory.padding[here],
        spatial_shapes=memory.spatial_shapes,
        valid_ratios=memory.valid_ratios[here],
    )
    shares = correlation(attention_map[here], of_picture, alone, legacy_padding=True)
    return torch.stack(list(shares.values()))


def _level_embeddings(model: Detector, memory: Memory) -> Tensor:
    """The learned vector of each token's level, which the stored positions do not have."""
    assert model.level_embedding is not None
    sizes = torch.tensor([rows * columns for rows, columns in memory.spatial_shapes])
    return model.level_embedding.repeat_interleave(sizes, dim=0)


def _compare_sums(case: Case, group: str, name: str, terms: Tensor) -> Iterator[Finding]:
    """Sums over the last axis, by the tolerance of one term."""
    if name in case.arrays:
        expected = case.arrays[name] / terms.shape[-1]
        yield compare_values(group, name, terms.mean(-1), expected, OUTPUT_TOLERANCE)


def _first(values: list[Tensor], selected: Order) -> Tensor:
    """Of the first two tokens that are updated, by the reference's order."""
    if selected is None:
        return torch.stack([one[:, :2] for one in values], dim=1)
    rows = torch.arange(len(selected))[:, None]
    return torch.stack([one[rows, selected[:, :2]] for one in values], dim=1)


def _order(case: Case, name: str, ours: Tensor) -> tuple[Order, tuple[Finding, ...]]:
    theirs = torch.from_numpy(case.arrays[name])
    odd = sum(
        len(set(mine.tolist()) ^ set(other.tolist()))
        for mine, other in zip(ours, theirs, strict=True)
    )
    order = (theirs[:, :, None] == ours[:, None, :]).int().argmax(-1)
    return order, (Finding("selection", float(odd), 0, name),)
