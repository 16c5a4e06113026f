"""Everything that a detector is taught in a step: its decoder, its tokens, its token selection.

The set criterion (`models.losses`) on each decoder layer, and where the detector has them on what
every token proposes after the encoder (two-stage Deformable DETR, terms `*_enc`), on what selected
tokens say after each encoder layer (Sparse DETR, section 3.3, `*_enc_l`) and on what tokens say
before the encoder (its objectness score, `*_backbone`), each with its own matching; and what the
scoring network says of the tokens (`models.selection_losses`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.detector_settings import DetectorSettings
from models.losses import (
    LossWeights,
    Reconstruction,
    Supervised,
    decoder_layers,
    supervised_losses,
)
from models.matching import Candidates, ClassScores, MatchingCosts
from models.selection_losses import (
    correlation,
    decoder_attention_map,
    most_read,
    scoring_losses,
)
from models.shares import Share, counts_of
from models.structures import (
    DetectorOutput,
    Losses,
    Memory,
    Targets,
    TokenPredictions,
    TokenSelection,
)

ProposalClasses = Literal["binary", "all"]
"""What tokens are taught: that there is an object (label 0), or which one."""


@dataclass(frozen=True)
class Supervision:
    """What a detector's settings say of how it is supervised; the defaults are DETR's."""

    class_scores: ClassScores = "softmax"
    proposal_classes: ProposalClasses = "binary"
    legacy_dam: bool = False
    """The released Sparse DETR's attention map, half a cell off."""
    legacy_padding: bool = False
    """The released Sparse DETR's use of padding: it counts in the loss of the scoring network, and
    tokens that only fill up a batch in those of the encoder layers.
    """


def supervision_of(settings: DetectorSettings) -> Supervision:
    """How a detector of these settings is supervised."""
    return Supervision(
        class_scores=settings.class_scores,
        proposal_classes=settings.proposal_classes,
        legacy_dam=settings.selection.legacy_dam,
        legacy_padding=settings.selection.legacy_padding,
    )


def detection_losses(
    output: DetectorOutput,
    targets: Targets,
    weights: LossWeights,
    costs: MatchingCosts,
    supervision: Supervision,
    *,
    reconstruction: Reconstruction | None = None,
    share: Share | None = None,
    blank: bool = False,
) -> Losses:
    """The loss of what a detector with one query group says, and every term by name.

    `share`, `blank` and the terms for the log as in `set_losses`; where decoder attention is
    recorded, also how much of it meets selected tokens (Corr), by the pictures of each part. What
    tokens say with softmax scores, as no paper has it, is divided as if every picture of the whole
    batch had as many tokens as those of this part on average. UnmatchableError as in `match_all`;
    see `unmatched_losses`.
    """
    supervised = _supervised(output, targets, supervision, reconstruction)
    share = share or Share(counts_of(targets, supervised[0].num_queries, blank=blank))
    selection, attention_map = output.memory.selection, None
    if selection is not None:
        attention_map = decoder_attention_map(output, legacy_dam=supervision.legacy_dam)
    scoring, met = None, {}
    if selection is not None and attention_map is not None:
        scoring = _scoring(output.memory, selection, attention_map, supervision)
        met = correlation(
            attention_map, output.memory, selection, legacy_padding=supervision.legacy_padding
        )
    losses = supervised_losses(
        supervised,
        targets,
        weights,
        costs,
        supervision.class_scores,
        share,
        blank=blank,
        scoring=scoring,
    )
    here = share.of_pictures(losses.total.new_full((), 0 if blank else len(targets.labels)))
    return Losses(losses.total, {**losses.terms, **{name: here * v for name, v in met.items()}})


def unmatched_losses(
    output: DetectorOutput,
    targets: Targets,
    supervision: Supervision,
    *,
    others: Sequence[Tensor] = (),
) -> Losses:
    """What stands in for `detection_losses` where nothing can be matched (UnmatchableError).

    A total of NaN that reaches every parameter behind the output and `others`: the loop then leaves
    the step out on all workers alike, where an exception would end one of them and leave the others
    waiting.
    """
    supervised = _supervised(output, targets, supervision, None)
    said = [
        tensor
        for each in supervised
        for tensor in (each.candidates.logits, each.candidates.boxes_cxcywh)
    ]
    selection = output.memory.selection
    if selection is not None and selection.scores is not None:
        said.append(selection.scores)
    return Losses(torch.stack([t.float().sum() for t in (*said, *others)]).sum() * torch.nan)


def _scoring(
    memory: Memory,
    selection: TokenSelection,
    attention_map: Float[Tensor, "batch tokens"],
    supervision: Supervision,
) -> Float[Tensor, " batch"] | None:
    """What the scoring network has to learn from each picture; None where there is no network."""
    if selection.scores is None:
        return None
    wanted = most_read(attention_map, memory.padding, selection)
    return scoring_losses(
        selection.scores, wanted, memory.padding, legacy_padding=supervision.legacy_padding
    )


def _supervised(
    output: DetectorOutput,
    targets: Targets,
    supervision: Supervision,
    reconstruction: Reconstruction | None,
) -> tuple[Supervised, ...]:
    """All predictions that are matched, those of the decoder first."""
    (group,) = output.groups
    decoder = decoder_layers(group, targets, reconstruction)
    return (decoder, *_of_tokens(output.memory, targets, supervision))


def _of_tokens(
    memory: Memory, targets: Targets, supervision: Supervision
) -> tuple[Supervised, ...]:
    """What tokens say, wherever they are asked.

    Encoder layers speak for a picture's selected tokens, always of its true classes; tokens that
    fill up its row are not heard, or its losses would depend on the other pictures of the batch (as
    in the released code).
    """
    supervised: list[Supervised] = []
    coarse = _token_targets(targets, supervision)
    if memory.proposals is not None:
        supervised.append(_tokens((memory.proposals,), ("the proposals",), ("_enc",), coarse))
    if memory.encoder_layers:
        numbers = range(len(memory.encoder_layers))
        places = tuple(f"encoder layer {number}" for number in numbers)
        suffixes = tuple(f"_enc_{number}" for number in numbers)
        heard = None
        if memory.selection is not None and not supervision.legacy_padding:
            heard = memory.selection.kept
        supervised.append(_tokens(memory.encoder_layers, places, suffixes, targets, heard))
    if memory.objectness is not None:
        places = ("the tokens before the encoder",)
        supervised.append(_tokens((memory.objectness,), places, ("_backbone",), coarse))
    return tuple(supervised)


def _tokens(
    layers: Sequence[TokenPredictions],
    places: tuple[str, ...],
    suffixes: tuple[str, ...],
    targets: Targets,
    counted: Bool[Tensor, "batch tokens"] | None = None,
) -> Supervised:
    logits = torch.stack([layer.logits.float() for layer in layers])
    boxes = torch.stack([layer.boxes.float() for layer in layers])
    return Supervised(suffixes, Candidates(places, logits, boxes, targets, counted))


def _token_targets(targets: Targets, supervision: Supervision) -> Targets:
    match supervision.proposal_classes:
        case "all":
            return targets
        case "binary":
            labels = tuple(torch.zeros_like(labels) for labels in targets.labels)
            return Targets(targets.boxes_cxcywh, labels)
        case _:
            assert_never(supervision.proposal_classes)
