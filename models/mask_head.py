"""A mask for every query: DETR's panoptic head (Carion et al., ECCV 2020, section 4.4, figure 8).

Attention maps of a query over the memory, one per head, beside the projected features of the
picture go through a small pyramid network that takes in layer3, layer2 and layer1 of the backbone
and puts out one mask at stride 4. Each query is a picture of its own there (the norms are group
norms), so only masks that are asked for are computed: in training those of matched queries, in
prediction those of queries above the threshold, instead of all 100 of the public code.

The first convolution sees the picture's 256 channels and the query's 8. It is linear, so its share
of the picture is computed once a picture and only that of the attention once a query: 4 % of the
products of what is the dearest layer of the public code (66 of 191 GMAC for the 100 queries of a
picture of 800x1333, counted; 0.38 s instead of 2.11 s of one CPU thread, measured).
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from models.detector import Detector
from models.matching import Matching, MatchingCosts, match
from models.settings import Settings
from models.structures import DetectorOutput, Images, Memory, Targets

SoftmaxOver = Literal["heads_and_positions", "positions"]

_NORM_GROUPS = 8


class MaskHeadSettings(Settings):
    """What the tensors of a mask head cannot tell."""

    softmax_over: SoftmaxOver = "positions"
    """What a query's attention sums to 1 over: the positions of each head (UP-DETR's correction) or
    heads and positions together, which the official DETR weights were trained with.
    """


@dataclass(frozen=True)
class MaskSource:
    """Detections, and all that the masks of any of their queries are made from."""

    detection: DetectorOutput
    projected: Float[Tensor, "batch dim rows columns"]
    """The backbone's features as they enter the encoder."""
    finer: tuple[Float[Tensor, "batch _ _ _"], ...]
    """The features of layer3, layer2 and layer1."""
    attention: Float[Tensor, "batch queries heads rows columns"]
    """Where each query of the last decoder layer looks."""


@dataclass(frozen=True)
class MatchedMasks:
    """Detections and the masks of those queries of the last layer that match a target."""

    detection: DetectorOutput
    matching: Matching
    """Of the last decoder layer."""
    logits: Float[Tensor, "pairs rows columns"]
    """One mask for each matched pair, at stride 4 of the padded batch; at least one: where nothing
    matches, that of the first query of the first picture, so that the graph is always whole.
    """


class PanopticDetector(nn.Module):
    """A frozen detector of things and stuff with a mask head, the only part that is trained.

    The detector's dropout stays on in training, as in the public code.
    """

    def __init__(
        self, detector: Detector, settings: MaskHeadSettings, generator: torch.Generator
    ) -> None:
        super().__init__()
        if detector.settings.class_scores != "softmax":
            raise ValueError(
                f"class_scores={detector.settings.class_scores}: a mask head goes on detectors "
                "with softmax scores alone; use class_scores=softmax"
            )
        self.settings = settings
        self.detector = detector.requires_grad_(False)
        dim, num_heads = detector.settings.hidden_dim, detector.settings.num_heads
        stages = detector.backbone.body.num_stages
        stride4, stride8, stride16, *_ = detector.backbone.level_channels(stages)
        self.attention = MaskAttention(dim, num_heads, settings.softmax_over)
        self.mask_head = MaskHead(dim, num_heads, (stride16, stride8, stride4))
        _initialise(self.attention, self.mask_head, generator)

    def forward(self, images: Images, targets: Targets, costs: MatchingCosts) -> MatchedMasks:
        """The masks of the queries that match the targets; UnmatchableError as in `match`."""
        source = self.detect(images)
        last = source.detection.groups[0].layers[-1]
        matching = match(last.logits[None], last.boxes[None], targets, costs)
        picture, query = matching.picture, matching.query
        if not matching.pairs_per_layer:
            picture = query = picture.new_zeros(1)
        return MatchedMasks(source.detection, matching, self.masks(source, picture, query))

    def detect(self, images: Images) -> MaskSource:
        """The detections, without a graph, and what masks are made from."""
        with torch.no_grad():
            stages = self.detector.backbone.stages(images.pixels)
            memory = self.detector.encode_features(stages[-1:], images.padding)
            group = self.detector.query_group(memory)
            detection = self.detector.decode(memory, (group,))
            # A second time: the encoder keeps its input to itself, and it is 1 % of the backbone.
            projected = self.detector.project(stages[-1])
        hidden = detection.groups[0].layers[-1].hidden
        rows, columns = memory.spatial_shapes[0]
        return MaskSource(
            detection=detection,
            projected=projected.transpose(1, 2).reshape(*hidden.shape[::2], rows, columns),
            finer=(stages[2], stages[1], stages[0]),
            attention=self.attention(hidden, memory),
        )

    def masks(
        self, source: MaskSource, picture: Int64[Tensor, " pairs"], query: Int64[Tensor, " pairs"]
    ) -> Float[Tensor, "pairs rows columns"]:
        """The mask logits, at stride 4, of the given queries of the given pictures."""
        attention = source.attention[picture, query]
        masks: Tensor = self.mask_head(source.projected, attention, picture, source.finer)
        return masks


class MaskAttention(nn.Module):
    """Where each query looks, head by head; nothing is taken from there."""

    def __init__(self, dim: int, num_heads: int, softmax_over: SoftmaxOver) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.softmax_over = softmax_over
        self.queries = nn.Linear(dim, dim)
        self.keys = nn.Linear(dim, dim)

    def forward(
        self, hidden: Float[Tensor, "batch queries dim"], memory: Memory
    ) -> Float[Tensor, "batch queries heads rows columns"]:
        """Weights in float32, 0 on padding; they sum to 1 over what the settings say."""
        queries = self._split(self.queries(hidden))
        keys = self._split(self.keys(memory.tokens))
        scale = queries.shape[-1] ** -0.5
        with torch.autocast(hidden.device.type, enabled=False):
            scores = torch.einsum("bqhc,bthc->bqht", queries.float() * scale, keys.float())
            weights = _softmax(scores, memory.padding, self.softmax_over)
        return weights.reshape(*weights.shape[:3], *memory.spatial_shapes[0])

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.view(*tokens.shape[:2], self.num_heads, -1)


class MaskHead(nn.Module):
    """Five 3x3 convolutions from the coarsest features to stride 4, and one to the mask."""

    def __init__(self, dim: int, num_heads: int, finer_channels: tuple[int, int, int]) -> None:
        super().__init__()
        first = dim + num_heads
        if dim % (16 * _NORM_GROUPS) or first % _NORM_GROUPS:
            raise ValueError(
                f"hidden_dim={dim} and num_heads={num_heads} do not fit a mask head, whose "
                f"channels are shared by {_NORM_GROUPS} groups; use a multiple of "
                f"{16 * _NORM_GROUPS} and of {_NORM_GROUPS}, e.g. hidden_dim=256 and num_heads=8"
            )
        widths = (first, first, dim // 2, dim // 4, dim // 8, dim // 16)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[n], widths[n + 1], 3, padding=1) for n in range(5)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(_NORM_GROUPS, width) for width in widths[1:])
        self.adapters = nn.ModuleList(
            nn.Conv2d(channels, width, 1)
            for channels, width in zip(finer_channels, widths[2:5], strict=True)
        )
        self.output = nn.Conv2d(widths[5], 1, 3, padding=1)

    def forward(
        self,
        projected: Float[Tensor, "batch dim rows columns"],
        attention: Float[Tensor, "pairs heads rows columns"],
        picture: Int64[Tensor, " pairs"],
        finer: tuple[Float[Tensor, "batch _ _ _"], ...],
    ) -> Float[Tensor, "pairs _ _"]:
        """One mask for each attention map, which belongs to a picture of the batch; logits."""
        masks = F.relu(self.norms[0](self._first(projected, attention, picture)))
        masks = F.relu(self.norms[1](self.convolutions[1](masks)))
        for level, features in enumerate(finer):
            lateral = self.adapters[level](features.to(self.output.weight.dtype))
            masks = F.interpolate(masks, size=lateral.shape[-2:], mode="nearest")
            masks = self.convolutions[level + 2](lateral[picture] + masks)
            masks = F.relu(self.norms[level + 2](masks))
        logits: Tensor = self.output(masks)
        return logits[:, 0]

    def _first(self, projected: Tensor, attention: Tensor, picture: Tensor) -> Tensor:
        """The first convolution, of what a picture's queries have in common once a picture."""
        first = self.convolutions[0]
        assert isinstance(first, nn.Conv2d)
        dim = projected.shape[1]
        of_picture, of_query = first.weight[:, :dim], first.weight[:, dim:]
        common = F.conv2d(projected.to(of_picture.dtype), of_picture, padding=1)
        own = F.conv2d(attention.to(of_query.dtype), of_query, first.bias, padding=1)
        return common[picture] + own


def _softmax(
    scores: Float[Tensor, "batch queries heads tokens"],
    padding: Bool[Tensor, "batch tokens"],
    over: SoftmaxOver,
) -> Float[Tensor, "batch queries heads tokens"]:
    scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
    match over:
        case "positions":
            return scores.softmax(-1)
        case "heads_and_positions":
            return scores.flatten(2).softmax(-1).view_as(scores)
        case _:
            assert_never(over)


@torch.no_grad()
def _initialise(attention: MaskAttention, head: MaskHead, generator: torch.Generator) -> None:
    """As the public code: Xavier-uniform attention, He-uniform convolutions, biases 0."""
    for linear in (attention.queries, attention.keys):
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
    for part in head.modules():
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            nn.init.kaiming_uniform_(part.weight, a=1, generator=generator)
            nn.init.zeros_(part.bias)
