"""The backbone under a detector: which network, what of it is trained, and how it is run.

A frozen backbone is inference: no graph, folded once, bfloat16 where the device is good at it. It
is most of a UP-DETR step (75 % of the FLOPs of the public code, measured: ResNet-50, 480x600, 10
patches).
"""

from collections.abc import Callable
from typing import Literal, Self, TypeGuard, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.dat import Dat, DatName, FoldedDat, TrainedSize, dat_layout, run_dat
from models.dat_attention import ReferenceGrid
from models.resnet import (
    FoldedResNet,
    ResNet,
    ResNetName,
    resnet_layout,
    run_levels,
    run_resnet,
    stage_channels,
)
from models.settings import Settings
from models.swin import CHANNELS as SWIN_CHANNELS
from models.swin import FoldedSwin, Swin, SwinName, run_swin

BackboneName = Literal[ResNetName, SwinName, DatName]
Body = ResNet | Swin | Dat
FoldedBackbone = FoldedResNet | FoldedSwin | FoldedDat
BackboneKind = Literal["resnet", "swin", "dat"]
Precision = Literal["auto", "float32", "bfloat16"]
Use = Literal["detector", "classifier"]
"""What a backbone is part of. A classifier's is trained from its first layer on, and a Swin in it
leaves windows unshifted where one covers the map, as those who published Swins did.
"""


_SWIN_DROP_PATH = 0.2


class BackboneSettings(Settings):
    """A ResNet with frozen BatchNorm, a Swin-T, or a DAT."""

    name: BackboneName = "resnet50"
    """A ResNet of some depth, swin_t, or a DAT: dat_t, dat_s, dat_b (CVPR 2022), or dat_pp_t,
    dat_pp_s, dat_pp_b (DAT++, which its authors call dat_tiny, dat_small, dat_base as well).
    """
    dilation: bool = False
    """Keep layer4 at stride 16 by dilation ("DC5"); bottleneck ResNets only."""
    stride_in_1x1: bool = False
    """Put a bottleneck's stride on its first 1x1 convolution (original ResNet), not on the 3x3."""
    output: Literal["layer3", "layer4"] = "layer4"
    """The last stage that the detector sees: layer4 (stride 32) or layer3 (stride 16); the last of
    a transformer and the one before it go by the same words.
    """
    weights: str | None = None
    """Where the weights come from: a path or any fsspec URL of a checkpoint, or "random"; null
    where a checkpoint of the whole detector brings them (`init`).
    """
    train: bool = False
    """Train from layer2 on, as DETR does; conv1, layer1 and every BatchNorm stay frozen. In a
    transformer the patch embedding and the first stage do, with the merging that ends it.
    """
    drop_path: float | None = Field(default=None, ge=0, lt=1)
    """Of a trained transformer: how often its last block is skipped for a picture (stochastic
    depth); the others less often, down to never for the first. null is what was published for
    ImageNet: 0.2 for swin_t, dat_t and dat_pp_t, 0.3 dat_s, 0.5 dat_b, 0.4 dat_pp_s, 0.7 dat_pp_b.
    """
    trained_size: TrainedSize = 224
    """Of a DAT: side of the pictures that its weights were trained with, in pixels. It decides how
    large its bias tables are, and the windows of dat_b: 7 cells, or 12 for 384 pixels.
    """
    reference_grid: ReferenceGrid = "published"
    """Of a DAT: where deformed points start from. `published` is what published weights were
    trained with, up to half a cell beside the cells; `aligned` is the cells themselves.
    """
    frozen_precision: Precision = "auto"
    """Precision of a frozen backbone; auto is bfloat16 where the device computes it natively."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for key, wanted in (("dilation", self.dilation), ("stride_in_1x1", self.stride_in_1x1)):
            if wanted and not has_bottlenecks(self.name):
                raise ValueError(
                    f"{key}=true needs bottleneck blocks, which name={self.name} does not have; "
                    f"use name=resnet50 or resnet101, or {key}=false"
                )
        for key, given in (
            ("trained_size=384", self.trained_size != 224),
            ("reference_grid=aligned", self.reference_grid != "published"),
        ):
            if given and kind_of(self.name) != "dat":
                raise ValueError(f"{key} is of a DAT, and name={self.name}; leave it out")
        if self.dilation and self.output == "layer3":
            raise ValueError(
                "dilation=true changes layer4 alone, which output=layer3 leaves out; "
                "use output=layer4 or dilation=false"
            )
        return self


class Backbone(nn.Module):
    """Pictures to feature maps; `channels` is the depth of the map, `body` holds the weights.

    `num_levels` says how many maps will be asked for in training: the LayerNorms of a Swin's other
    maps, which would never see a gradient, stay frozen.
    """

    def __init__(
        self, settings: BackboneSettings, num_levels: int = 3, use: Use = "detector"
    ) -> None:
        super().__init__()
        self.settings = settings
        self.body = _body(settings, use)
        self.channels = self.body.channels
        frozen = (*_unused_norms(self.body, num_levels), *_frozen_parts(self.body, use))
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(settings.train and not name.startswith(frozen))
        self.body.train()
        self._folded: FoldedBackbone | None = None
        self._folded_from: tuple[tuple[int, int], ...] = ()

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Features of normalised pictures, channels last.

        A frozen backbone makes no graph and computes in `frozen_precision`.
        """
        if self.settings.train:
            return run_last(self.body.fold(self._dtype()), pixels)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return run_last(self.fold(), pixels)

    def levels(
        self, pixels: Float[Tensor, "batch 3 height width"], count: int
    ) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """The features of the last `count` stages, shallowest first; `forward` gives the last.

        Their channels are `level_channels(count)`. ValueError where there are fewer stages.
        """
        self._check_count(count)
        if self.settings.train:
            return folded_levels(self.body.fold(self._dtype()), pixels, count)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return folded_levels(self.fold(), pixels, count)

    def level_channels(self, count: int) -> tuple[int, ...]:
        """Depths of the maps of `levels`. ValueError where there are fewer stages."""
        self._check_count(count)
        last = self.body.num_stages
        return _all_channels(self.settings.name)[last - count : last]

    def stages(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """The features of every stage, that of stride 4 first; `forward` gives the last."""
        return self.levels(pixels, self.body.num_stages)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def fold(self) -> FoldedBackbone:
        """The frozen network as it is run; made anew when a weight was loaded, moved, changed."""
        tensors = (*self.body.parameters(), *self.body.buffers())
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._folded is None or state != self._folded_from:
            precision = frozen_dtype(self.settings.frozen_precision, tensors[0].device)
            with torch.no_grad():
                self._folded = self.body.fold(precision)
            self._folded_from = state
        return self._folded

    def _dtype(self) -> torch.dtype:
        return next(self.body.parameters()).dtype

    def _check_count(self, count: int) -> None:
        available = self.body.num_stages
        if not 1 <= count <= available:
            raise ValueError(
                f"{count} levels were asked of a {self.settings.name} with "
                f"output={self.settings.output}, which has 1 to {available}; ask for fewer"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A move may put new values where the old ones lay, so the folded weights go first."""
        self._folded = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles carry the weights alone; folded ones are made anew when needed."""
        return {**self.__dict__, "_folded": None, "_folded_from": ()}


def run_last(
    folded: FoldedBackbone, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch channels rows columns"]:
    """The map of the last stage alone, in the precision of the folded weights."""
    match folded:
        case FoldedResNet():
            return run_resnet(folded, pixels)
        case FoldedSwin() | FoldedDat():
            (last,) = folded_levels(folded, pixels, 1)
            return last
        case _:
            assert_never(folded)


def folded_levels(folded: FoldedBackbone, pixels: Tensor, count: int) -> tuple[Tensor, ...]:
    """The maps of the last `count` stages, shallowest first, in the folded weights' precision."""
    match folded:
        case FoldedResNet():
            return run_levels(folded, pixels, count)
        case FoldedSwin():
            return run_swin(folded, pixels, count)
        case FoldedDat():
            return run_dat(folded, pixels, count)
        case _:
            assert_never(folded)


def kind_of(name: BackboneName) -> BackboneKind:
    """The family of networks that it is of."""
    match name:
        case "resnet18" | "resnet34" | "resnet50" | "resnet101":
            return "resnet"
        case "swin_t":
            return "swin"
        case "dat_t" | "dat_s" | "dat_b" | "dat_pp_t" | "dat_pp_s" | "dat_pp_b":
            return "dat"
        case _:
            assert_never(name)


def is_resnet(name: BackboneName) -> TypeGuard[ResNetName]:
    """Whether it is a ResNet, which others' detectors can name."""
    return kind_of(name) == "resnet"


def has_bottlenecks(name: BackboneName) -> bool:
    """Whether it is a ResNet of bottleneck blocks, which can dilate and move their strides."""
    if not is_resnet(name):
        return False
    bottleneck, _ = resnet_layout(name)
    return bottleneck


def frozen_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The precision in which a frozen backbone runs on a device."""
    match precision:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
        case _:
            assert_never(precision)


def feature_padding(
    padding: Bool[Tensor, "batch height width"], rows: int, columns: int
) -> Bool[Tensor, "batch rows columns"]:
    """The padding mask at the size of a feature map, nearest neighbour as in DETR."""
    resized = F.interpolate(padding[None].float(), size=(rows, columns), mode="nearest")
    return resized[0].bool()


def _body(settings: BackboneSettings, use: Use) -> Body:
    num_stages = 4 if settings.output == "layer4" else 3
    match settings.name:
        case "swin_t":
            return Swin(
                num_stages=num_stages,
                drop_path=_SWIN_DROP_PATH if settings.drop_path is None else settings.drop_path,
                shifts_covering_windows=use == "detector",
            )
        case "resnet18" | "resnet34" | "resnet50" | "resnet101" as name:
            return ResNet(
                name,
                num_stages=num_stages,
                dilation=settings.dilation,
                stride_in_1x1=settings.stride_in_1x1,
            )
        case name:
            published = dat_layout(name).drop_path
            return Dat(
                name,
                num_stages=num_stages,
                drop_path=published if settings.drop_path is None else settings.drop_path,
                trained_size=settings.trained_size,
                grid=settings.reference_grid,
            )


def _frozen_parts(body: Body, use: Use) -> tuple[str, ...]:
    """How the names of those parameters begin that training leaves as they are."""
    if use == "classifier":
        return ()
    match body:
        case ResNet():
            return ("conv1.", "layer1.")
        case Swin() | Dat():
            return ("patch_embedding.", "stages.0.")
        case _:
            assert_never(body)


def _unused_norms(body: Body, num_levels: int) -> tuple[str, ...]:
    """How the norms begin of maps that nobody asks for."""
    return tuple(f"norms.{stage}." for stage in range(body.num_stages - num_levels))


def _all_channels(name: BackboneName) -> tuple[int, ...]:
    """Of the maps of all four stages, stride 4 first."""
    match name:
        case "swin_t":
            return SWIN_CHANNELS
        case "resnet18" | "resnet34" | "resnet50" | "resnet101":
            return tuple(stage_channels(name, stage) for stage in range(4))
        case _:
            return dat_layout(name).channels


def _computes_bfloat16(device: torch.device) -> bool:
    """True where the hardware computes in bfloat16; elsewhere it is emulated, hence slower."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu":
            capabilities = torch.cpu.get_capabilities()
            return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        case _:
            return False
