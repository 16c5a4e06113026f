"""A detector as ONNX, compared with torch in onnxruntime before anybody gets it.

Inputs: `pixels` float32 [batch, 3, height, width], normalised by ImageNet's mean and deviation, and
`padding` bool [batch, height, width], True on padding; all three sizes are free. Outputs: `logits`
[batch, queries, classes + 1], the last one "no object" (sigmoid scores: [batch, queries, classes]),
and `boxes` [batch, queries, 4], cxcywh normalised to the unpadded picture. Deformable attention is
traced as plain gathers (`models.ops.gather`); a sparse encoder goes through all tokens and keeps
what it would select, so its graph is right and saves nothing. The padding mask stays an input,
since pictures of one batch differ in size. BatchNorms are folded into the convolutions. Costs 13 s
of one CPU core for a small ResNet-18 detector, 54 s for DETR R50 with four comparisons (measured),
most of it the tracing.
"""

import importlib
import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from data.normalise import normalised_images
from data.pictures import decode_picture, resize, resized_size
from data.synthetic import draw_scene
from finetune.picture_sources import read_bytes
from models.artefact import PictureInput
from models.backbone import folded_levels
from models.detector import Detector
from models.interop.checkpoint_files import WeightsError
from models.structures import Images

BOX_TOLERANCE = 1e-4
"""Largest difference of a coordinate, in shares of the picture."""
LOGIT_TOLERANCE = 1e-3
"""Largest difference of a logit."""

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_DRAWN_SIDES = ((160, 208), (224, 144), (97, 131))
"""Heights and widths of drawn pictures: the first two in one batch, the third, odd, alone."""


def write_onnx(
    detector: Detector,
    picture_input: PictureInput,
    metadata: Mapping[str, str],
    path: Path,
    pictures: Sequence[str] = (),
) -> tuple[str, ...]:
    """Writes the detector with `metadata` among its properties; a sentence for each comparison.

    Compared on drawn pictures, two of different sizes in one padded batch and one alone, and on
    `pictures` (paths or URLs) at the detector's own size.

    Raises:
        WeightsError: onnxruntime says something else than torch; nothing is of use then.
        ValueError: a package is missing, or a picture cannot be decoded.
    """
    _require_packages()
    traced = _Traced(detector).eval()
    _trace(traced, metadata, path)
    checks = [
        _compared("two drawn pictures in a padded batch", traced, _drawn(_DRAWN_SIDES[:2]), path),
        _compared("a drawn picture of odd size", traced, _drawn(_DRAWN_SIDES[2:]), path),
    ]
    checks += [
        _compared(picture, traced, _images([_prepared(picture, picture_input)]), path)
        for picture in pictures
    ]
    return tuple(checks)


class _Traced(nn.Module):
    """The detector as a function of two tensors, with the backbone folded for good, in float32."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.requires_grad_(False).float()
        self.folded = detector.backbone.body.fold(torch.float32)

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        padding: Bool[Tensor, "batch height width"],
    ) -> tuple[Float[Tensor, "batch queries logits"], Float[Tensor, "batch queries 4"]]:
        count = self.detector.settings.backbone_levels
        memory = self.detector.encode_features(folded_levels(self.folded, pixels, count), padding)
        group = self.detector.query_group(memory)
        last = self.detector.decode(memory, (group,)).groups[0].layers[-1]
        return last.logits, last.boxes


def _require_packages() -> None:
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"format onnx needs {package}: pip install 'querypatch[onnx]' ({error})"
            ) from None


def _trace(traced: _Traced, metadata: Mapping[str, str], path: Path) -> None:
    images = _drawn(_DRAWN_SIDES[:2])
    axes = {0: "batch", 2: "height", 3: "width"}
    try:
        # The exporter warns of its own workings and writes its progress to stdout.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced,
                (images.pixels, images.padding),
                input_names=["pixels", "padding"],
                output_names=["logits", "boxes"],
                dynamic_shapes={"pixels": axes, "padding": {0: "batch", 1: "height", 2: "width"}},
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise WeightsError(
            f"torch {torch.__version__} cannot trace the detector for ONNX "
            f"({str(error).partition(chr(10))[0]}); try another version, or another format"
        ) from error
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _compared(what: str, traced: _Traced, images: Images, path: Path) -> str:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {"pixels": images.pixels.numpy(), "padding": images.padding.numpy()}
    found = session.run(["logits", "boxes"], given)
    with torch.no_grad():
        wanted = traced(images.pixels, images.padding)
    logits, boxes = (
        float(np.abs(theirs - ours.numpy()).max())
        for theirs, ours in zip(found, wanted, strict=True)
    )
    # Written so that NaN is not close either.
    if not (logits <= LOGIT_TOLERANCE and boxes <= BOX_TOLERANCE):
        raise WeightsError(
            f"onnxruntime differs from torch on {what}: logits by {logits:.1e} (allowed "
            f"{LOGIT_TOLERANCE:.0e}), boxes by {boxes:.1e} (allowed {BOX_TOLERANCE:.0e}); "
            "nothing was exported; try other versions of onnxruntime or torch"
        )
    return f"{what}: logits within {logits:.1e}, boxes within {boxes:.1e}"


def _drawn(sides: Sequence[tuple[int, int]]) -> Images:
    return _images(
        [
            resize(decode_picture(draw_scene(seed=0, number=number).jpeg), height, width)
            for number, (height, width) in enumerate(sides)
        ]
    )


def _prepared(picture: str, size: PictureInput) -> UInt8[np.ndarray, "_ _ 3"]:
    decoded = decode_picture(read_bytes(picture))
    height, width = decoded.shape[:2]
    return resize(decoded, *resized_size(height, width, size.short_side, size.max_size))


def _images(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Images:
    sizes = torch.tensor([picture.shape[:2] for picture in pictures])
    height, width = sizes.amax(0).tolist()
    padded = torch.zeros(len(pictures), height, width, 3, dtype=torch.uint8)
    for place, picture in zip(padded, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = torch.from_numpy(picture)
    return normalised_images(padded, sizes)
