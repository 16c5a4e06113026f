"""The weights of a panoptic detector: from an artefact to a model that segments."""

import torch
from torch import Tensor

from finetune.artefacts import bare_tensors, build_detector
from models.artefact import Artefact
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.mask_head import MaskHeadSettings, PanopticDetector

_HEAD = ("attention.", "mask_head.")


def build_panoptic(artefact: Artefact) -> PanopticDetector:
    """The detector of an artefact with its mask head, in evaluation mode, on the CPU.

    Raises:
        WeightsError: it has no mask head, or its tensors do not fit its architecture.
    """
    if artefact.kind != "panoptic":
        raise WeightsError(
            f"{artefact.source} is a {artefact.kind} without a mask head; train one on it with "
            "task=panoptic and init= this file"
        )
    settings = artefact.masks or MaskHeadSettings()
    model = PanopticDetector(build_detector(artefact), settings, torch.Generator())
    load_mask_head(model, artefact)
    return model.eval()


def check_dense(settings: DetectorSettings) -> None:
    """Raises WeightsError for a detector that a mask head cannot go on."""
    if "deformable" in (settings.encoder_attention, settings.decoder_attention):
        raise WeightsError(
            "task=panoptic: a mask head reads dense attention to one feature map, which deformable "
            "attention has not; give init= a DETR detector (dense attention)"
        )
    if settings.class_scores == "sigmoid":
        raise WeightsError(
            "task=panoptic: a mask head goes on detectors with softmax scores alone, this one has "
            "class_scores=sigmoid; give init= a DETR detector"
        )


def load_mask_head(
    model: PanopticDetector, artefact: Artefact
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Puts the artefact's mask head, if it has one, into the model; names of (loaded, new) tensors.

    Raises:
        WeightsError: the tensors do not fit, or belong to another softmax of the attention.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_HEAD)}
    if artefact.kind != "panoptic":
        return (), tuple(own)
    _check_softmax(model, artefact)
    given = {
        name: tensor for name, tensor in bare_tensors(artefact).items() if name.startswith(_HEAD)
    }
    _check_tensors(own, given, artefact.source)
    model.load_state_dict(given, strict=False)
    return tuple(own), ()


def _check_softmax(model: PanopticDetector, artefact: Artefact) -> None:
    ours = model.settings.softmax_over
    theirs = (artefact.masks or MaskHeadSettings()).softmax_over
    if ours != theirs:
        raise WeightsError(
            f"the mask head of {artefact.source} was trained with softmax_over={theirs}, the "
            f"recipe says {ours}; say panoptic.head.softmax_over={theirs}"
        )


def _check_tensors(own: dict[str, Tensor], given: dict[str, Tensor], source: str) -> None:
    odd = sorted(
        name
        for name in {*own, *given}
        if name not in own or name not in given or own[name].shape != given[name].shape
    )
    if odd:
        raise WeightsError(
            f"{source}: {len(odd)} tensors of the mask head are missing, unexpected or of another "
            f"shape, e.g. {odd[0]}; give a panoptic file of the same backbone and hidden_dim"
        )
