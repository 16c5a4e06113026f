"""Weights out: ours, the public code's, transformers', ONNX; to any fsspec URL.

Everything is written locally, checked there, and put whole; a place where something lies already is
left alone unless asked. A detector is built from the weights first, so a file that does not fit its
architecture is not exported.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, assert_never

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.artefacts import (
    BESIDE,
    COUNTERS,
    OF_DISTILLATION,
    bare_name,
    fill,
    open_weights,
)
from finetune.classifier_weights import build_classifier
from finetune.headed import build_headed
from finetune.model_card import model_card
from finetune.onnx_export import write_onnx
from models.artefact import METADATA_KEY, Artefact, artefact_metadata
from models.backbone import kind_of
from models.detector import Detector
from models.interop.checkpoint_files import WeightsError
from models.interop.conditional import to_conditional_names
from models.interop.deformable import to_deformable_names
from models.interop.detr import detr_name, refuse_nameless
from models.interop.hugging_face import (
    hugging_face_config,
    hugging_face_processor,
    to_hugging_face,
)
from models.interop.panoptic import panoptic_name
from training.run_folder import RunFolder, open_run_folder

ExportFormat = Literal["querypatch", "detr", "hf", "onnx"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
PROCESSOR = "preprocessor_config.json"

_SUFFIXES = {"detr": ".pth", "onnx": ".onnx"}
"""Formats of one file, and how its name must end."""

_FOLDER_FILES = {
    "querypatch": (CARD, CONFIG, WEIGHTS),
    "hf": (CARD, PROCESSOR, CONFIG, WEIGHTS),
}
"""Formats of a folder, and its files in the order in which they are put."""

_LINEAR_IN_NAME = ("input_proj.weight", "detr.input_proj.weight")
"""What public files keep as a 1x1 convolution."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    files: tuple[str, ...]
    """URLs."""
    checks: tuple[str, ...]
    """What was compared before, a sentence each."""


def export(
    source: str,
    destination: str,
    format: ExportFormat,
    *,
    overwrite: bool = False,
    pictures: Sequence[str] = (),
) -> Export:
    """Writes the weights that `open_weights(source)` opens to a path or any fsspec URL.

    querypatch: a folder with model.safetensors, config.json and a model card. detr: a `.pth` with
    the tensor names of the detector's public code: DETR, UP-DETR, DETRsegm for panoptic weights,
    Deformable DETR or Sparse DETR. hf: a folder that `DetrForObjectDetection.from_pretrained`
    loads. onnx: an `.onnx` that was compared with torch on
    drawn pictures and on `pictures`, paths or URLs.

    Raises:
        WeightsError: weights that do not fit, or that the format cannot express.
        ValueError: a destination of another kind, or one that is taken.
        OSError: it cannot be read or written.
    """
    folder, names = _place(destination, format)
    _check_free(folder, names, overwrite)
    artefact = open_weights(source)
    if artefact.kind == "classifier":
        return _as_ours(artefact, build_classifier(artefact), format, folder, names)
    if artefact.kind in ("retinanet", "mask_rcnn"):
        return _as_ours(artefact, build_headed(artefact), format, folder, names)
    detector = _detector(artefact)
    with tempfile.TemporaryDirectory(prefix="querypatch-export-") as scratch:
        spool = Path(scratch)
        checks = _write(artefact, detector, format, spool, names, pictures)
        for name in names:
            folder.put(spool / name, name)
    return Export(tuple(f"{folder.url}/{name}" for name in names), checks)


def _place(destination: str, format: ExportFormat) -> tuple[RunFolder, tuple[str, ...]]:
    """The folder to write to, and the names of the files there."""
    suffix = _SUFFIXES.get(format)
    if suffix is None:
        return open_run_folder(destination), _FOLDER_FILES[format]
    if not destination.endswith(suffix):
        raise ValueError(
            f"format {format} is one file; give a destination that ends in {suffix}, "
            f"e.g. {destination.rstrip('/')}/detector{suffix}"
        )
    folder, _, name = open_run_folder(destination).url.rpartition("/")
    return open_run_folder(folder or "/"), (name,)


def _check_free(folder: RunFolder, names: Sequence[str], overwrite: bool) -> None:
    taken = [name for name in names if folder.size(name) is not None]
    if taken and not overwrite:
        raise ValueError(
            f"{folder.url}/{taken[0]} exists; give another destination, or ask to overwrite it"
        )


def _detector(artefact: Artefact) -> Detector:
    """The detector alone, whatever holds it."""
    detector = Detector(artefact.detector, torch.Generator()).eval()
    fill(detector, artefact, left_out=OF_DISTILLATION if artefact.kind == "detector" else BESIDE)
    return detector


def _write(
    artefact: Artefact,
    detector: Detector,
    format: ExportFormat,
    spool: Path,
    names: Sequence[str],
    pictures: Sequence[str],
) -> tuple[str, ...]:
    match format:
        case "querypatch":
            _write_ours(artefact, _our_tensors(artefact, detector), spool)
            return ()
        case "detr":
            header = {METADATA_KEY: _header(artefact)[METADATA_KEY]}
            torch.save({"model": _public_tensors(artefact, detector), **header}, spool / names[0])
            return ()
        case "hf":
            _refuse_other_kinds(artefact, format)
            _write_hugging_face(artefact, detector, spool)
            return ()
        case "onnx":
            _refuse_other_kinds(artefact, format)
            _refuse_windows(artefact)
            header = {METADATA_KEY: _header(artefact)[METADATA_KEY]}
            return write_onnx(detector, artefact.input, header, spool / names[0], pictures)
        case _:
            assert_never(format)


def _as_ours(
    artefact: Artefact,
    model: nn.Module,
    format: ExportFormat,
    folder: RunFolder,
    names: Sequence[str],
) -> Export:
    """What has no public form."""
    if format != "querypatch":
        raise WeightsError(
            f"{artefact.source} is a {artefact.kind}, format {format} holds DETR detectors alone; "
            "export it with format querypatch, of which a detector takes the backbone by "
            "model.backbone.weights="
        )
    with tempfile.TemporaryDirectory(prefix="querypatch-export-") as scratch:
        _write_ours(artefact, model.state_dict(), Path(scratch))
        for name in names:
            folder.put(Path(scratch) / name, name)
    return Export(tuple(f"{folder.url}/{name}" for name in names), ())


def _write_ours(artefact: Artefact, own: Mapping[str, Tensor], spool: Path) -> None:
    header = _header(artefact)
    tensors = {name: tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, spool / WEIGHTS, metadata={**header, "format": "pt"})
    _write_json(spool / CONFIG, json.loads(header[METADATA_KEY]))
    (spool / CARD).write_text(model_card(artefact, "querypatch"), encoding="utf-8")


def _write_hugging_face(artefact: Artefact, detector: Detector, spool: Path) -> None:
    config = hugging_face_config(artefact.detector, artefact.classes)
    tensors = to_hugging_face(detector.state_dict(), artefact.detector.hidden_dim)
    save_file(tensors, spool / WEIGHTS, metadata={**_header(artefact), "format": "pt"})
    _write_json(spool / CONFIG, config)
    sizes = artefact.input
    _write_json(spool / PROCESSOR, hugging_face_processor(sizes.short_side, sizes.max_size))
    (spool / CARD).write_text(model_card(artefact, "hf"), encoding="utf-8")


def _our_tensors(artefact: Artefact, detector: Detector) -> dict[str, Tensor]:
    """As the model of this kind names and shapes them, without BatchNorm's counters."""
    prefix = "" if artefact.kind == "detector" else "detector."
    own = {f"{prefix}{name}": tensor for name, tensor in detector.state_dict().items()}
    bare = {bare_name(name) for name in own}
    beside = {
        name: tensor
        for name, tensor in artefact.tensors.items()
        if bare_name(name) not in bare
        and not any(fnmatch(bare_name(name), pattern) for pattern in (COUNTERS, *OF_DISTILLATION))
    }
    return own | beside


def _public_tensors(artefact: Artefact, detector: Detector) -> dict[str, Tensor]:
    """As the public code names and shapes them, float32, on the CPU."""
    settings = artefact.detector
    if "deformable" in (settings.encoder_attention, settings.decoder_attention):
        return to_deformable_names(_our_tensors(artefact, detector), settings)
    if settings.decoder_attention == "conditional":
        return to_conditional_names(_our_tensors(artefact, detector), settings)
    refuse_nameless(settings)
    name_of: Callable[[str], str] = panoptic_name if artefact.kind == "panoptic" else detr_name
    public = {
        name_of(name): tensor.detach().float().cpu().clone()
        for name, tensor in _our_tensors(artefact, detector).items()
    }
    for name in _LINEAR_IN_NAME:
        if name in public:
            public[name] = public[name][:, :, None, None]
    return public


def _refuse_other_kinds(artefact: Artefact, format: ExportFormat) -> None:
    if artefact.kind != "detector":
        raise WeightsError(
            f"{artefact.source} is a {artefact.kind}, format {format} holds detectors alone; "
            "export it with format querypatch or detr"
        )


def _refuse_windows(artefact: Artefact) -> None:
    """Tracing Swin's windows for pictures of any size did not end in 12 minutes (torch 2.14)."""
    backbone = artefact.detector.backbone.name
    if kind_of(backbone) != "resnet":
        other = " or detr" if kind_of(backbone) == "swin" else ""
        raise WeightsError(
            f"{artefact.source} has a {backbone}, whose windows cannot be traced for pictures of "
            f"any size; export it with format querypatch{other}"
        )


def _header(artefact: Artefact) -> dict[str, str]:
    """What a file of others began as is the first of its chain."""
    provenance = artefact.provenance
    if artefact.form != "querypatch" and not provenance.version:
        chain = (artefact.source, *provenance.init)
        artefact = replace(artefact, provenance=provenance.model_copy(update={"init": chain}))
    return artefact_metadata(
        artefact.kind,
        artefact.detector,
        artefact.classes,
        artefact.input,
        artefact.provenance,
        artefact.masks,
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
