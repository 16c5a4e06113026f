"""What a picture costs a detector in inference, in multiply-adds, as the papers count.

At 850x1040 pixels this gives the public 172.93 G of Deformable DETR (ResNet-50) and 180.40 G of the
same with Swin-T: products and convolutions, one for each multiplication with its addition; four for
each sampled value, one a corner; five for each value of a LayerNorm or GroupNorm, as fvcore does.
Such counters take an operator that they do not know for nothing (1.1 % here); the sampling is
therefore counted from its shapes, whichever way it is computed. Softmax, activations and sums are
free.

The model runs on tensors without values, so a count is of what runs: once each head that inference
needs. Public code evaluates the box heads of a refining decoder twice (0.24 G more) and the
auxiliary heads of a sparse encoder (1.4 G at rho = 0.1, 7.2 G at 0.5), hence its 177.33 G for our
177.09, and 111.19 for 109.51.
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import Backbone
from models.classifier import Classifier
from models.dat import FoldedDat
from models.dat_attention import DatAttention
from models.deformable_attention import DeformableAttention
from models.detector import Detector
from models.neighbourhood import NeighbourhoodAttention
from models.structures import Images

_CORNERS = 4
_PER_NORMALISED = 5
_Counts = Counter[str]


def count_classifier(classifier: Classifier, height: int, width: int) -> int:
    """Multiply-adds of one picture of height x width pixels, as DAT's authors count theirs.

    Their 4.59, 9.01 and 15.79 G of DAT-T, S and B are products and convolutions, norms and what is
    sampled, as above. It may lie on the device `meta`, where no weight takes memory, and stays as
    it is.
    """
    model = copy.deepcopy(classifier).eval().requires_grad_(False)
    seen = _Seen()
    _watch_backbone(model.backbone, seen)
    operations = FlopCounterMode(display=False, custom_mapping=NORMALISATIONS)
    pixels = torch.empty(1, 3, height, width, device=model.head.weight.device)
    with torch.no_grad(), operations, sdpa_kernel(SDPBackend.MATH):
        model(pixels)
    return operations.get_total_flops() // 2 + seen.sampling["backbone"]


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one picture, by what they are for; norms are where they stand."""

    backbone: int
    projections: int
    """Of the backbone's maps to the transformer's channels."""
    scoring: int
    """Of all tokens, by what selects those that the encoder updates."""
    encoder_values: int
    """Of deformable attention, for all tokens in every layer: no selection makes it less."""
    encoder_queries: int
    """What else the attention of updated tokens projects, and norms; of dense attention all."""
    encoder_sampling: int
    encoder_feedforward: int
    proposals: int
    """Two-stage: what all tokens say after the encoder, and the queries made of the best."""
    decoder: int
    """With its sampling, and the points where learned queries look first."""
    heads: int
    """Classes and boxes of all decoder layers."""

    @property
    def encoder(self) -> int:
        """All of it."""
        attention = self.encoder_values + self.encoder_queries + self.encoder_sampling
        return attention + self.encoder_feedforward

    @property
    def total(self) -> int:
        """Of the whole detector."""
        before = self.backbone + self.projections + self.scoring + self.encoder
        return before + self.proposals + self.decoder + self.heads


def count_flops(detector: Detector, height: int, width: int) -> MultiplyAdds:
    """Of one unpadded picture of height x width pixels; the detector stays as it is."""
    model = copy.deepcopy(detector).eval().requires_grad_(False)
    seen = _watch(model)
    if not model.settings.backbone.train:
        # Where its precision is another one it is copied, and storages are not copied among fakes.
        model.backbone.fold()
    _watch_backbone(model.backbone, seen)
    rho = model.settings.rho
    operations = FlopCounterMode(display=False, custom_mapping=NORMALISATIONS)
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        padding = torch.zeros(1, height, width, dtype=torch.bool)
        sizes = torch.empty(1, 2, dtype=torch.int64)
        images = Images(torch.empty(1, 3, height, width), padding, sizes)
        with torch.no_grad(), operations, _Selecting(seen, 1.0 if rho is None else rho):
            model(images)
    # FlopCounterMode counts a multiplication and its addition as two.
    spent = {name: sum(n.values()) // 2 for name, n in operations.get_flop_counts().items()}
    parts = _by_part(spent, seen.sampling, model)
    return replace(parts, backbone=parts.backbone + seen.sampling["backbone"])


def _by_part(spent: dict[str, int], sampling: _Counts, model: Detector) -> MultiplyAdds:
    """From what modules spent, by name, those that they call included."""

    def of(*names: str) -> int:
        return sum(n for part, n in spent.items() if _is_one_of(part, names))

    def in_layers(ending: str) -> int:
        return sum(
            n
            for part, n in spent.items()
            if part.startswith("Detector.encoder.layers.") and part.endswith(ending)
        )

    values, feedforward = in_layers(".self_attention.value_proj"), in_layers(".feedforward")
    scoring = of("scorer", "objectness_class_head")
    proposals = of("proposal_class_head", "proposal_box_head", "proposal_queries")
    # The same projection for both, of all tokens.
    projected = of("proposal_tokens") // ((scoring > 0) + (proposals > 0) or 1)
    scoring += projected if scoring else 0
    proposals += projected if proposals else 0
    projections = of("input_projection", "input_projections")
    heads, encoder = of("class_head", "box_head"), of("encoder")
    decoder = of("decoder", "reference_points")
    if model.settings.refines_boxes:
        decoder -= of("box_head")
    backbone = spent["Detector"] - scoring - proposals - projections - heads - encoder - decoder
    return MultiplyAdds(
        backbone=backbone,
        projections=projections,
        scoring=scoring,
        encoder_values=values,
        encoder_queries=encoder - values - feedforward,
        encoder_sampling=sampling["encoder"],
        encoder_feedforward=feedforward,
        proposals=proposals,
        decoder=decoder + sampling["decoder"],
        heads=heads,
    )


def _is_one_of(part: str, names: tuple[str, ...]) -> bool:
    """Whether it is a part of the detector with such a name, or one of a list of that name."""
    wholes = [f"Detector.{name}" for name in names]
    return any(part == whole or part.removeprefix(f"{whole}.").isdigit() for whole in wholes)


@dataclass
class _Seen:
    """What the modules were given, as far as operations do not tell."""

    tokens: int = 0
    sampling: _Counts = field(default_factory=Counter)


def _watch(model: Detector) -> _Seen:
    seen = _Seen()

    def projected(_module: nn.Module, _given: Any, said: Tensor) -> None:
        """Tokens in rows, or a map."""
        seen.tokens += said.shape[1] if said.dim() == 3 else math.prod(said.shape[2:])

    def sampled(name: str, part: DeformableAttention, given: tuple[Any, ...]) -> None:
        queries, values = given[0], given[2]
        samples = queries.shape[1] * part.num_levels * part.num_points
        seen.sampling[name] += samples * math.prod(values.shape[2:]) * _CORNERS

    for name in ("encoder", "decoder"):
        for part in model.get_submodule(name).modules():
            if isinstance(part, DeformableAttention):
                part.register_forward_pre_hook(partial(sampled, name))
    for level in model.input_projections or (model.input_projection,):
        if level is not None:
            level.register_forward_hook(projected)
    return seen


def _watch_backbone(backbone: Backbone, seen: _Seen) -> None:
    """A DAT as it runs: its keys are sampled, and a bias for each query and key of each head.

    Of neighbourhood attention what it is defined as counts, not what its tiles compute beside it.
    """

    def sampled(part: DatAttention, given: tuple[Tensor]) -> None:
        rows, columns = given[0].shape[1:3]
        stride = part.kind.stride
        keys = math.ceil(rows / stride) * math.ceil(columns / stride)
        values = keys * (part.kind.channels + part.kind.heads * rows * columns)
        seen.sampling["backbone"] += values * _CORNERS

    def masked(part: NeighbourhoodAttention, given: tuple[Tensor]) -> None:
        rows, columns = (max(length, part.kernel) for length in given[0].shape[1:3])
        seen.sampling["backbone"] -= part.masked_products(rows, columns)

    runs = backbone.body.fold(torch.float32) if backbone.settings.train else backbone.fold()
    if isinstance(runs, FoldedDat):
        for part in runs.network.modules():
            if isinstance(part, DatAttention):
                part.register_forward_pre_hook(sampled)
            if isinstance(part, NeighbourhoodAttention):
                part.register_forward_pre_hook(masked)


class _Selecting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers the one number that a model reads back: how many tokens it selects."""

    def __init__(self, seen: _Seen, rho: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen
        self.rho = rho

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """All else is computed as ever."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return min(int(self.rho * self.seen.tokens) + 1, self.seen.tokens)
        return func(*args, **(kwargs or {}))


def _normalisation(given: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _PER_NORMALISED * math.prod(given)


NORMALISATIONS = {
    torch.ops.aten.native_layer_norm: _normalisation,
    torch.ops.aten.native_group_norm: _normalisation,
}
"""What `FlopCounterMode` does not count by itself, twice the multiply-adds as it wants it."""
