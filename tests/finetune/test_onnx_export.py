"""ONNX says what torch says, on pictures with and without padding, or does not get out."""

import json
import shutil
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import onnxruntime
import pytest
import torch

from data.normalise import normalised_images
from data.pictures import decode_picture, resize
from finetune.artefacts import build_detector, open_weights
from finetune.export import Export, export
from models.artefact import METADATA_KEY
from models.backbone import BackboneSettings
from models.interop.checkpoint_files import WeightsError
from models.structures import Images
from tests.finetune.small_detector import SETTINGS, write_weights
from tests.models.test_detector import images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Export:
    """Traced without the tests' type checks: sizes are symbols then, and no ints."""
    write_weights(folder / "w.safetensors", SETTINGS.model_copy(update={"pre_norm": True}))
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return export(str(folder / "w.safetensors"), str(folder / "w.onnx"), "onnx")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def largest_differences(folder: Path, given: Images) -> tuple[float, float]:
    """Of logits and boxes, between onnxruntime and the detector itself."""
    session = onnxruntime.InferenceSession(folder / "w.onnx")
    fed = {"pixels": given.pixels.numpy(), "padding": given.padding.numpy()}
    logits, boxes = session.run(["logits", "boxes"], fed)
    with torch.no_grad():
        wanted = build_detector(open_weights(str(folder / "w.safetensors")))(given)
    last = wanted.groups[0].layers[-1]
    return (
        float(np.abs(logits - last.logits.numpy()).max()),
        float(np.abs(boxes - last.boxes.numpy()).max()),
    )


@pytest.mark.parametrize(
    "sizes",
    [((64, 96), (96, 33)), ((70, 101),), ((33, 31), (20, 47), (64, 64))],
    ids=["padded both ways", "one picture of odd size", "smaller than the stride"],
)
def test_outputs_equal_torch_whatever_batch_size_and_padding(
    folder: Path, exported: Export, sizes: tuple[tuple[int, int], ...]
) -> None:
    """Peers' bug 10."""
    assert exported.files == (str(folder / "w.onnx"),)
    logits, boxes = largest_differences(folder, images(*sizes))
    assert logits < 1e-4
    assert boxes < 1e-5


def test_outputs_equal_torch_on_real_pictures(
    folder: Path, exported: Export, shared_data: Path
) -> None:
    """Peers' bug 10, on two VOC pictures of different sizes in one batch."""
    assert exported.checks
    names = ("2008_000009", "2008_000073")
    jpegs = shared_data / "VOCdevkit" / "VOC2012" / "JPEGImages"
    padded = torch.zeros(2, 120, 128, 3, dtype=torch.uint8)
    sizes = ((96, 128), (120, 90))
    for place, name, size in zip(padded, names, sizes, strict=True):
        picture = resize(decode_picture((jpegs / f"{name}.jpg").read_bytes()), *size)
        place[: size[0], : size[1]] = torch.from_numpy(picture)
    logits, boxes = largest_differences(folder, normalised_images(padded, torch.tensor(sizes)))
    assert logits < 1e-4
    assert boxes < 1e-5


def test_padding_is_not_looked_at(folder: Path, exported: Export) -> None:
    """A mask that the graph had frozen or dropped would show here: the answers would agree."""
    session = onnxruntime.InferenceSession(exported.files[0])
    given = images((64, 96), (96, 33))
    fed = {"pixels": given.pixels.numpy(), "padding": given.padding.numpy()}
    unpadded = fed | {"padding": np.zeros_like(fed["padding"])}
    (masked,), (free,) = (session.run(["boxes"], inputs) for inputs in (fed, unpadded))
    assert np.abs(masked[1] - free[1]).max() > 1e-4


def test_the_checks_are_told_and_the_header_is_in_the_file(folder: Path, exported: Export) -> None:
    told = [check.partition(": logits within")[0] for check in exported.checks]
    assert told == ["two drawn pictures in a padded batch", "a drawn picture of odd size"]
    session = onnxruntime.InferenceSession(folder / "w.onnx")
    header = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert (header["class_names"], header["class_ids"]) == (["person", "car", "dog"], [1, 4, 17])
    assert [(given.name, given.shape) for given in session.get_inputs()] == [
        ("pixels", ["batch", 3, "height", "width"]),
        ("padding", ["batch", "height", "width"]),
    ]


def test_a_graph_that_differs_from_torch_is_not_put_in_place(
    folder: Path, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers' bug 10: an export that is wrong without a word. Here it is of other weights."""
    write_weights(folder / "other.safetensors", seed=4)

    def wrong(traced: object, metadata: object, path: Path) -> None:
        shutil.copy(exported.files[0], path)

    monkeypatch.setattr("finetune.onnx_export._trace", wrong)
    with pytest.raises(WeightsError, match=r"onnxruntime differs from torch on two drawn pictures"):
        export(str(folder / "other.safetensors"), str(folder / "other.onnx"), "onnx")
    assert not (folder / "other.onnx").exists()


def test_pictures_of_the_users_are_compared_too(
    folder: Path, exported: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from data.synthetic import draw_scene

    (tmp_path / "own.jpg").write_bytes(draw_scene(seed=1, number=0).jpeg)

    def again(traced: object, metadata: object, path: Path) -> None:
        shutil.copy(exported.files[0], path)

    monkeypatch.setattr("finetune.onnx_export._trace", again)
    place = str(tmp_path / "own.jpg")
    told = export(str(folder / "w.safetensors"), str(tmp_path / "w.onnx"), "onnx", pictures=[place])
    assert told.checks[2].startswith(f"{place}: logits within")


def test_a_missing_package_is_named_with_its_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnxscript: pip install 'querypatch\[onnx\]'"):
        export(str(tmp_path / "w.safetensors"), str(tmp_path / "w.onnx"), "onnx")
    assert not (tmp_path / "w.onnx").exists()


def test_a_swin_is_refused_before_it_is_traced(tmp_path: Path) -> None:
    swin = BackboneSettings(name="swin_t", output="layer3", weights="random")
    write_weights(tmp_path / "w.safetensors", SETTINGS.model_copy(update={"backbone": swin}))
    with pytest.raises(WeightsError, match=r"has a swin_t, .* format querypatch or detr"):
        export(str(tmp_path / "w.safetensors"), str(tmp_path / "w.onnx"), "onnx")
    assert not (tmp_path / "w.onnx").exists()
