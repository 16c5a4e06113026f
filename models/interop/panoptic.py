"""Panoptic checkpoints with the tensor names of facebookresearch/detr's and up-detr's DETRsegm.

The whole detector is under `detr.`, beside it `bbox_attention` and `mask_head`. What the softmax
of the mask attention runs over leaves no trace in the tensors: the official DETR weights
(post-norm) were trained with heads and positions together, UP-DETR's (pre-norm) with positions.
"""

from collections.abc import Mapping

from torch import Tensor

from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.detr import detr_name, detr_settings, to_detr_names
from models.interop.placing import LoadReport, place_tensors
from models.mask_head import MaskHeadSettings, PanopticDetector

_DETECTOR = "detr."

NAMES = (
    ("attention.queries.", "bbox_attention.q_linear."),
    ("attention.keys.", "bbox_attention.k_linear."),
    *((f"mask_head.convolutions.{n}.", f"mask_head.lay{n + 1}.") for n in range(5)),
    *((f"mask_head.norms.{n}.", f"mask_head.gn{n + 1}.") for n in range(5)),
    *((f"mask_head.adapters.{n}.", f"mask_head.adapter{n + 1}.") for n in range(3)),
    ("mask_head.output.", "mask_head.out_lay."),
)
"""(Ours, theirs): how a name begins."""


def is_panoptic(tensors: Mapping[str, Tensor]) -> bool:
    """Whether public tensors (`read_tensors`) hold a mask head."""
    return "mask_head.lay1.weight" in tensors


def panoptic_name(ours: str) -> str:
    """The public name of a tensor of a PanopticDetector."""
    if ours.startswith("detector."):
        return _DETECTOR + detr_name(ours)
    for begin, theirs in NAMES:
        if ours.startswith(begin):
            return theirs + ours.removeprefix(begin)
    raise ValueError(f"{ours} is no tensor of a panoptic detector; give one of its state dict")


def load_panoptic(
    model: PanopticDetector, tensors: Mapping[str, Tensor], *, source: str
) -> LoadReport:
    """Fill a model from public tensors, strictly; WeightsError lists all misfits."""
    return place_tensors(
        model,
        tensors,
        file_name=panoptic_name,
        left_out=("*.num_batches_tracked",),
        source=source,
    )


def to_panoptic_names(model: PanopticDetector) -> dict[str, Tensor]:
    """The model's tensors as the public code names and shapes them, float32, on the CPU."""
    detector = {_DETECTOR + name: tensor for name, tensor in to_detr_names(model.detector).items()}
    head = {
        panoptic_name(ours): tensor.detach().float().cpu().clone()
        for ours, tensor in model.state_dict().items()
        if not ours.startswith("detector.")
    }
    return detector | head


def detector_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The detector of public panoptic tensors, with the names of a detector's own file."""
    return {
        name.removeprefix(_DETECTOR): tensor
        for name, tensor in tensors.items()
        if name.startswith(_DETECTOR)
    }


def panoptic_settings(
    tensors: Mapping[str, Tensor], *, source: str, dilation: bool = False
) -> tuple[DetectorSettings, MaskHeadSettings]:
    """The architecture that public panoptic tensors belong to, its backbone frozen.

    The number of heads is what the mask head takes in besides the projected features. WeightsError
    where the tensors are not those of a panoptic DETR.
    """
    if not is_panoptic(tensors):
        raise WeightsError(
            f"{source} holds no mask head (mask_head.lay1.weight is missing): give a panoptic "
            "checkpoint of DETR or UP-DETR"
        )
    hidden_dim = len(tensors["bbox_attention.q_linear.weight"])
    detector = detr_settings(
        detector_tensors(tensors),
        source=source,
        num_heads=len(tensors["mask_head.lay1.weight"]) - hidden_dim,
        dilation=dilation,
    )
    over = "positions" if detector.pre_norm else "heads_and_positions"
    return detector, MaskHeadSettings.model_validate({"softmax_over": over})
