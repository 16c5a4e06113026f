"""UP-DETR: object queries that look for given patches (Dai et al., CVPR 2021, section 3).

The N queries are shared evenly between M query patches: query n searches for patch n // (N / M).
What it searches for, the pooled CNN feature of the patch, is projected and added to its position
vector; queries of different patches do not see each other. Costs one more run of the CNN, on the
patches (36 % of its FLOPs at 10 patches of 128 pixels, measured).

Deformable, conditional and anchor decoders (Zhu et al., ICLR 2021; Sparse, Conditional and DAB-
DETR) are ours, no paper has them. There the patch is added to the content instead, and the
reference point or anchor stays the learned one. In conditional decoders content is compared with
content, place with place; in deformable ones:

- Dense attention compares query and keys, so that a position vector can find its patch. Deformable
  attention compares nothing: offsets and weights are linear in the query. A patch in the position
  vector could say where to look and never meet what was seen, as values, feed-forward network and
  heads read the content alone. In the content it does, in every layer, and stays by residual sums.
- A pooled feature cannot say where the patch was: points that moved with it would only lose the
  spread over the picture that a group of N / M queries begins with.
- Finetuning with top-k proposals puts a token's feature in that place (`models.proposals`).

This is reasoned, not measured: after 400 steps on drawn feature maps, a patch in the position
vector and one in the content had learned equally little of whose patch is whose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, assert_never

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.heads import Perceptron
from models.initialise import initialise
from models.settings import Settings
from models.structures import DetectorOutput, Images, QueryGroup


class QueryPatches(Settings):
    """How query patches are given to the object queries."""

    num_patches: int = Field(default=10, gt=0)
    """Patches cut from each picture; they share the object queries evenly."""
    attention_mask: bool = True
    """Hide the queries of other patches in the decoder's self-attention."""
    shuffle: bool = False
    """Assign query vectors to patches anew in every step (paper, not the public recipe)."""
    mask_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of patch features that are hidden from their queries in training."""
    mask_unit: Literal["per_query", "per_patch"] = "per_query"
    """Hide a feature from one query (public code) or from all queries of its patch (paper)."""
    reconstruction: bool = True
    """Let every query also reconstruct the CNN feature of its patch."""
    detach_features: bool = True
    """Keep the reconstruction loss from moving its target, a trained CNN (public code: false)."""


@dataclass(frozen=True)
class PatchDraws:
    """The random choices of one training step."""

    keep: Bool[Tensor, "batch queries"]
    """False where a query does not get the feature of its patch."""
    order: Int64[Tensor, " queries"]
    """The query vector that each place uses."""

    def of_pictures(self, places: Sequence[int]) -> Self:
        """The choices for some of the pictures, by their places in the batch."""
        return replace(self, keep=self.keep[list(places)])


@dataclass(frozen=True)
class PatchOutput:
    """What a detector finds when it is told what to look for."""

    detection: DetectorOutput
    """One group of queries, those of the first patch first."""
    patch_features: Float[Tensor, "batch patches channels"]
    """Pooled CNN features of the patches, float32: what queries get, and reconstruct."""
    reconstructions: Float[Tensor, "layers batch queries channels"] | None
    """The reconstructed features by decoder layer, None where reconstruction is off."""


def hidden_queries(
    num_queries: int, num_patches: int
) -> Bool[Tensor, "{num_queries} {num_queries}"]:
    """True where a query (row) must not attend to a query (column).

    Queries see only the group of their own patch, so no group can read another patch's answer. (The
    public code fills the blocks of N / M patches only, which leaves whole rows hidden, hence NaN,
    where M > N / M.)
    """
    group = torch.arange(num_queries) // queries_per_patch(num_queries, num_patches)
    return group[:, None] != group[None, :]


def queries_per_patch(num_queries: int, num_patches: int) -> int:
    """N / M; ValueError where the queries cannot be shared evenly."""
    if num_queries % num_patches:
        raise ValueError(
            f"num_queries={num_queries} cannot be shared evenly between num_patches={num_patches}; "
            f"use a multiple, e.g. num_queries={num_patches * max(1, num_queries // num_patches)}"
        )
    return num_queries // num_patches


def check_patterns(settings: DetectorSettings, patches: QueryPatches) -> None:
    """Raises ValueError where each patch would be searched for from some patterns alone."""
    if settings.num_patterns and patches.num_patches > 1:
        raise ValueError(
            f"num_patterns={settings.num_patterns} with num_patches={patches.num_patches} ties "
            "patches to patterns; use num_patterns=0 here, and patterns when the transformer is "
            "finetuned"
        )


def draw_patch_queries(
    settings: QueryPatches, num_queries: int, batch: int, generator: torch.Generator
) -> PatchDraws:
    """The draws of one step, on the generator's device.

    Each feature is kept with probability 1 - mask_ratio, independently per query and picture, or
    per patch and picture; with `shuffle` one permutation of the query vectors serves the whole
    batch, else they stay in place.
    """
    share = queries_per_patch(num_queries, settings.num_patches)
    device = generator.device
    match settings.mask_unit:
        case "per_query":
            chance = torch.rand(batch, num_queries, generator=generator, device=device)
        case "per_patch":
            chance = torch.rand(batch, settings.num_patches, generator=generator, device=device)
            chance = chance.repeat_interleave(share, dim=1)
        case _:
            assert_never(settings.mask_unit)
    order = torch.arange(num_queries, device=device)
    if settings.shuffle:
        order = torch.randperm(num_queries, generator=generator, device=device)
    return PatchDraws(keep=chance >= settings.mask_ratio, order=order)


class PatchDetector(nn.Module):
    """A detector that is told which patches to look for; `detector` is what finetuning keeps."""

    hidden: Tensor

    def __init__(
        self, settings: DetectorSettings, patches: QueryPatches, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.patches = patches
        check_patterns(settings, patches)
        self.num_queries = settings.total_queries
        self.queries_per_patch = queries_per_patch(self.num_queries, patches.num_patches)
        self.detector = Detector(settings, generator)
        self.detector.learned_queries()
        channels = self.detector.backbone.channels
        self.patch_projection = nn.Linear(channels, settings.hidden_dim)
        initialise(self.patch_projection, generator)
        self.reconstruction = (
            Perceptron(settings.hidden_dim, settings.hidden_dim, channels, num_layers=2)
            if patches.reconstruction
            else None
        )
        if self.reconstruction is not None:
            initialise(self.reconstruction, generator)
        hidden = hidden_queries(self.num_queries, patches.num_patches)
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(
        self,
        images: Images,
        patches: Float[Tensor, "batch patches 3 patch_height patch_width"],
        draws: PatchDraws | None = None,
    ) -> PatchOutput:
        """Find the patches in the pictures.

        Training takes exactly `num_patches` patches and the step's draws; evaluation takes any
        number up to it, on the first queries. ValueError where patches or draws do not fit.
        """
        self._check(patches.shape[1], draws)
        features = self.patch_features(patches)
        memory = self.detector.encode(images)
        detection = self.detector.decode(memory, (self.query_group(features, draws),))
        reconstructions = None
        if self.reconstruction is not None:
            (group,) = detection.groups
            hidden = torch.stack([layer.hidden for layer in group.layers])
            reconstructions = self.reconstruction(hidden)
        target = features.detach() if self.patches.detach_features else features
        return PatchOutput(detection, target, reconstructions)

    def patch_features(
        self, patches: Float[Tensor, "batch patches 3 patch_height patch_width"]
    ) -> Float[Tensor, "batch patches channels"]:
        """The CNN's feature map of each patch, averaged over its cells."""
        pooled: Tensor = self.detector.backbone(patches.flatten(0, 1)).mean(
            (2, 3), dtype=torch.float32
        )
        batch, num_patches = patches.shape[:2]
        return pooled.view(batch, num_patches, -1)

    def query_group(
        self, features: Float[Tensor, "batch patches channels"], draws: PatchDraws | None
    ) -> QueryGroup:
        """The object queries that look for patches of these features, the first patch's first."""
        searched = self.patch_projection(features.to(self.patch_projection.weight.dtype))
        searched = searched.repeat_interleave(self.queries_per_patch, dim=1)
        num_queries = searched.shape[1]
        order = torch.arange(num_queries, device=searched.device)
        if draws is not None:
            searched = searched * draws.keep.to(searched.device)[..., None]
            order = draws.order.to(searched.device)
        learned, batch = self.detector.learned_queries(), len(searched)
        content, position = learned.content[order], _ordered(learned.position, order, batch)
        if learned.reference is None:
            assert position is not None
            content, position = content.expand(batch, -1, -1), searched + position
        else:
            content = searched + content
        restricted = self.patches.attention_mask and self.patches.num_patches > 1
        return QueryGroup(
            name="patches",
            content=content,
            position=position,
            reference=_ordered(learned.reference, order, batch),
            intra_mask=self.hidden[:num_queries, :num_queries] if restricted else None,
        )

    def _check(self, num_patches: int, draws: PatchDraws | None) -> None:
        settings = self.patches
        expected = settings.num_patches
        if num_patches > expected or (self.training and num_patches != expected):
            amount = "exactly" if self.training else "at most"
            raise ValueError(
                f"got {num_patches} patches per picture, the model has num_patches={expected}; "
                f"give {amount} {expected}"
            )
        if self.training and draws is None and (settings.mask_ratio or settings.shuffle):
            raise ValueError(
                f"training with mask_ratio={settings.mask_ratio}, shuffle={settings.shuffle} "
                "needs draws; make them with draw_patch_queries"
            )
        if draws is not None and num_patches != expected:
            raise ValueError(
                f"draws are for all {expected} patches, got {num_patches}; give draws=None"
            )


def _ordered(learned: Tensor | None, order: Tensor, batch: int) -> Tensor | None:
    """What stays where it is, whatever a query searches for."""
    return None if learned is None else learned[order].expand(batch, -1, -1)
