"""`querypatch study keep-ratio`: numbers, time and multiply-adds over rho."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from finetune.keep_ratio import study_keep_ratio
from models.artefact import Provenance, artefact_metadata
from models.detector import Detector
from models.detector_settings import DetectorSettings
from querypatch import app
from tests.finetune.small_detector import CLASSES, INPUT
from tests.finetune.test_evaluate_weights import NAMES, coco_set
from training.recipe import RecipeError

SPARSE = {
    "backbone": {"name": "resnet18"},
    "encoder_attention": "deformable",
    "decoder_attention": "deformable",
    "feature_levels": 2,
    "hidden_dim": 32,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "feedforward_dim": 24,
    "num_queries": 7,
    "class_scores": "sigmoid",
    "num_classes": 3,
    "rho": 0.3,
}


def weights(folder: Path, **given: object) -> str:
    settings = DetectorSettings.model_validate(SPARSE | given)
    detector = Detector(settings, torch.Generator().manual_seed(0))
    metadata = artefact_metadata("detector", settings, CLASSES, INPUT, Provenance())
    save_file(detector.state_dict(), folder / "w.safetensors", metadata=metadata)
    return str(folder / "w.safetensors")


def test_the_sweep_is_drawn_printed_and_written_as_json(tmp_path: Path) -> None:
    out = tmp_path / "drawn" / "rho.png"
    told = ["study", "keep-ratio", weights(tmp_path), coco_set(tmp_path, NAMES), "processes=0"]
    shares = ["--rho", "0.1", "--rho", "0.3", "--rho", "1"]
    done = CliRunner().invoke(app, [*told, *shares, "--device", "cpu", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert out.stat().st_size > 10_000
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["trained_with"] == 0.3
    points = content["points"]
    assert [point["rho"] for point in points] == [0.1, 0.3, 1.0]
    assert len(content["timed_sizes"]) == 4
    whole = [point["cost"]["multiply_adds"] for point in points]
    encoder = [point["cost"]["encoder_multiply_adds"] for point in points]
    assert whole == sorted(set(whole))
    assert [total - part for total, part in zip(whole, encoder, strict=True)] == [
        whole[0] - encoder[0]
    ] * 3
    for point in points:
        assert 0 < point["cost"]["encoder_seconds"] < point["cost"]["seconds"]
        assert point["numbers"].keys() >= {"ap", "ap50"}
    assert [point["corr"] for point in points] == sorted(point["corr"] for point in points)
    assert "GFLOPs" in done.output


def test_weights_that_choose_no_tokens_have_nothing_to_study(tmp_path: Path) -> None:
    source, url = weights(tmp_path, rho=None), coco_set(tmp_path, NAMES)
    with pytest.raises(RecipeError, match="has no token selection"):
        study_keep_ratio(source, url, [], torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"rho=0\.0: should be greater than 0"):
        study_keep_ratio(weights(tmp_path), url, [], torch.device("cpu"), [0.0])
