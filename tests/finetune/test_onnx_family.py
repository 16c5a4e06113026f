"""ONNX of DAB-DETR, Deformable and Sparse DETR says what torch says, on a real picture too."""

from pathlib import Path

import jaxtyping
import pytest
import torch
from safetensors.torch import save_file

from finetune.export import export
from models.artefact import Provenance, artefact_metadata
from models.detector import Detector
from tests.finetune.small_detector import CLASSES, INPUT
from tests.finetune.test_family_transfer import CONDITIONAL, SPARSE, settings_of

PICTURE = "VOCdevkit/VOC2012/JPEGImages/2008_000009.jpg"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "given",
    [{}, SPARSE, CONDITIONAL | {"query_kind": "anchor", "num_patterns": 2}],
    ids=["learned queries", "sparse and two-stage", "anchors"],
)
def test_the_family_is_exported_and_compared_on_a_real_picture(
    given: dict[str, object], shared_data: Path, tmp_path: Path
) -> None:
    """Traced without the tests' type checks: sizes are symbols then, and no ints."""
    settings = settings_of(num_classes=3, **given)
    detector = Detector(settings, torch.Generator().manual_seed(2))
    metadata = artefact_metadata("detector", settings, CLASSES, INPUT, Provenance())
    save_file(detector.state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    picture = str(shared_data / PICTURE)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        told = export(
            str(tmp_path / "w.safetensors"), str(tmp_path / "w.onnx"), "onnx", pictures=[picture]
        )
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert len(told.checks) == 3
    assert told.checks[2].startswith(f"{picture}: logits within")
