"""`querypatch study decoder-depth`: what each layer finds, and what each part costs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from data.detection_set import open_detection_set
from data.evaluation_batches import EvaluationSizes
from finetune.artefacts import open_weights
from finetune.decoder_depth import study_decoder_depth
from finetune.evaluate_weights import judged_boxes
from finetune.evaluation import EvaluationSettings
from models.artefact import Provenance, artefact_metadata
from models.flops import count_flops
from querypatch import app
from tests.finetune.small_detector import CLASSES, INPUT
from tests.finetune.test_evaluate_weights import NAMES, coco_set
from tests.models.distillation_small import KINDS, detector_of

CPU = torch.device("cpu")


def weights(folder: Path, kind: str, **changes: object) -> str:
    detector = detector_of(kind, **changes)
    metadata = artefact_metadata("detector", detector.settings, CLASSES, INPUT, Provenance())
    save_file(detector.state_dict(), folder / "w.safetensors", metadata=metadata)
    return str(folder / "w.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_finds_what_the_detector_finds_and_parts_make_up_the_whole(
    kind: str, tmp_path: Path
) -> None:
    source, data = weights(tmp_path, kind), coco_set(tmp_path, NAMES)
    study = study_decoder_depth(source, data, ["processes=0"], CPU)
    assert [depth.layers for depth in study.depths] == [1, 2]
    settings = EvaluationSettings(
        processes=0, sizes=EvaluationSizes(short_side=INPUT.short_side, max_size=INPUT.max_size)
    )
    judged = judged_boxes(open_weights(source), open_detection_set(data), settings, CPU)
    assert study.depths[-1].numbers == pytest.approx(judged.numbers(), nan_ok=True)
    detector = detector_of(kind)
    spent = count_flops(detector, *study.size)
    assert sum(part.multiply_adds for part in study.parts) == spent.total
    assert study.depths[0].multiply_adds == spent.total - spent.decoder // 2
    total = sum(part.parameters for part in study.parts)
    assert total == sum(parameter.numel() for parameter in detector.parameters())
    assert min(part.parameters for part in study.parts) >= 0


def test_it_is_drawn_printed_and_written_as_json(tmp_path: Path) -> None:
    out = tmp_path / "drawn" / "depth.png"
    told = ["study", "decoder-depth", weights(tmp_path, "conditional"), coco_set(tmp_path, NAMES)]
    done = CliRunner().invoke(app, [*told, "processes=0", "--device", "cpu", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert out.stat().st_size > 10_000
    content = json.loads(out.with_suffix(".json").read_text())
    assert [part["name"] for part in content["parts"]] == [
        *("backbone", "encoder", "decoder", "heads", "others")
    ]
    assert "decoder layers" in done.output
    assert "parameters M" in done.output
