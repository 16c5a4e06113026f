"""torchvision's RetinaNet and Mask R-CNN on our backbones: the other heads of the DAT paper.

RetinaNet (Lin et al., ICCV 2017) and Mask R-CNN (He et al., ICCV 2017) on a feature pyramid, as DAT
and Swin are compared (Xia et al., CVPR 2022, section 4.2). Heads, anchors, losses and
post-processing are torchvision's; ours is what brings a backbone, pictures and targets to them.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import (
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from models.backbone import Backbone, BackboneSettings
from models.structures import Images

HeadName = Literal["retinanet", "mask_rcnn"]

STRIDE = 32
"""Pictures are padded to a multiple of this, the stride of a backbone's last map."""

_CHANNELS = 256


@dataclass(frozen=True)
class FoundObjects:
    """What was found in one picture, the surest first."""

    boxes_xyxy: Float[Tensor, "objects 4"]
    """Pixels of the picture whose size was asked for."""
    labels: Int64[Tensor, " objects"]
    """Ours: 0 first."""
    scores: Float[Tensor, " objects"]
    masks: Bool[Tensor, "objects height width"] | None
    """Of Mask R-CNN, at that size."""


class HeadedDetector(nn.Module):
    """A backbone, a feature pyramid and one of torchvision's heads; drawn from `generator`.

    `backbone.body` has the weights of the backbone, as in a `Detector`.
    """

    def __init__(
        self,
        settings: BackboneSettings,
        head: HeadName,
        num_classes: int,
        generator: torch.Generator,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.head_name = head
        seed = int(torch.randint(2**62, (1,), generator=generator))
        with torch.random.fork_rng(devices=[]):
            # torchvision draws from the global state.
            torch.manual_seed(seed)
            pyramid = Pyramid(settings, head)
            self.model = _headed(pyramid, head, num_classes, max_detections)
        self.model.transform = _AsItIs()

    @property
    def backbone(self) -> Backbone:
        """With its weights in `body`."""
        pyramid = self.model.backbone
        assert isinstance(pyramid, Pyramid)
        return pyramid.own

    def forward(
        self, images: Images, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """torchvision's losses by name in training, means over the pictures; else what it finds.

        `targets` are those of `torchvision_targets`.
        """
        transform = self.model.transform
        assert isinstance(transform, _AsItIs)
        transform.sizes = _pairs(images.sizes)
        pictures = list(images.pixels)
        found: dict[str, Tensor] | list[dict[str, Tensor]] = self.model(pictures, targets)
        return found

    def find(self, images: Images, sizes: Int64[Tensor, "batch 2"]) -> list[FoundObjects]:
        """What is found in each picture, in pixels of pictures of these (height, width)."""
        found = self(images)
        assert isinstance(found, list)
        placed = GeneralizedRCNNTransform.postprocess(
            self.model.transform, found, _pairs(images.sizes), _pairs(sizes)
        )
        first = _first_label(self.head_name)
        return [
            FoundObjects(
                each["boxes"],
                each["labels"] - first,
                each["scores"],
                each["masks"][:, 0] > 0.5 if "masks" in each else None,
            )
            for each in placed
        ]


class Pyramid(nn.Module):
    """A backbone's maps as torchvision's heads want them: of 256 channels, by name."""

    def __init__(self, settings: BackboneSettings, head: HeadName) -> None:
        super().__init__()
        self.num_levels = _num_levels(head)
        self.own = Backbone(settings, self.num_levels)
        extra = LastLevelP6P7(_CHANNELS, _CHANNELS) if head == "retinanet" else LastLevelMaxPool()
        channels = list(self.own.level_channels(self.num_levels))
        self.fpn = FeaturePyramidNetwork(channels, _CHANNELS, extra)
        self.out_channels = _CHANNELS

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> OrderedDict[str, Float[Tensor, "batch 256 _ _"]]:
        """The finest first; RetinaNet's are of strides 8 to 128, Mask R-CNN's of 4 to 64."""
        levels = self.own.levels(pixels, self.num_levels)
        dtype = next(self.fpn.parameters()).dtype
        named = OrderedDict((str(n), level.to(dtype)) for n, level in enumerate(levels))
        found: OrderedDict[str, Tensor] = self.fpn(named)
        return found


def torchvision_targets(
    images: Images,
    boxes_cxcywh: tuple[Float[Tensor, "_ 4"], ...],
    labels: tuple[Int64[Tensor, " _"], ...],
    head: HeadName,
    masks: tuple[Bool[Tensor, "_ _ _"], ...] | None = None,
) -> list[dict[str, Tensor]]:
    """Our targets as torchvision's: corners in pixels of each unpadded picture.

    Mask R-CNN's label 0 is the background, so its labels are ours and 1.
    """
    found = []
    for number, (boxes, classes) in enumerate(zip(boxes_cxcywh, labels, strict=True)):
        height, width = images.sizes[number]
        scale = torch.stack((width, height, width, height)).to(boxes.dtype)
        centre, half = boxes[:, :2], 0.5 * boxes[:, 2:]
        corners = torch.cat((centre - half, centre + half), dim=1) * scale
        target = {"boxes": corners, "labels": classes + _first_label(head)}
        if masks is not None:
            target["masks"] = masks[number].to(torch.uint8)
        found.append(target)
    return found


class _AsItIs(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Pictures are resized and normalised already: they are only put together, padded with 0."""

    def __init__(self) -> None:
        super().__init__(0, 0, [0.0], [1.0])
        self.sizes: list[tuple[int, int]] = []
        """(height, width) of the next pictures without padding."""

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        pixels = torch.stack(images)
        rows, columns = (-size % STRIDE for size in pixels.shape[2:])
        return ImageList(F.pad(pixels, (0, columns, 0, rows)), self.sizes), targets

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],  # noqa: ARG002
        original_image_sizes: list[tuple[int, int]],  # noqa: ARG002
    ) -> list[dict[str, Tensor]]:
        """The size that is wanted is known to `HeadedDetector.find` alone."""
        return result


def _pairs(sizes: Int64[Tensor, "batch 2"]) -> list[tuple[int, int]]:
    return [(height, width) for height, width in sizes.tolist()]


def _headed(pyramid: Pyramid, head: HeadName, num_classes: int, max_detections: int) -> nn.Module:
    found: nn.Module
    match head:
        case "retinanet":
            found = RetinaNet(pyramid, num_classes, detections_per_img=max_detections)
        case "mask_rcnn":
            found = MaskRCNN(pyramid, num_classes + 1, box_detections_per_img=max_detections)
        case _:
            assert_never(head)
    return found


def _num_levels(head: HeadName) -> int:
    match head:
        case "retinanet":
            return 3
        case "mask_rcnn":
            return 4
        case _:
            assert_never(head)


def _first_label(head: HeadName) -> int:
    return 0 if head == "retinanet" else 1
