"""Which weights of a run are taken."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.interop.checkpoint_files import WeightsError
from tests.training.small import small_state
from training.checkpoint import save_checkpoint
from training.ema import EmaSettings
from training.run_folder import RunFolder, open_run_folder
from training.run_weights import RunWeights, run_weights, weights_file
from training.snapshot import CheckpointError, Position, TrainingState, take_snapshot


def save(folder: RunFolder, step: int, *, ema: bool = False, **metrics: float) -> None:
    """A checkpoint whose live weights all are its step, and whose averages are half of it."""
    state = small_state(EmaSettings() if ema else None)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(float(step))
    if state.ema:
        state.ema.load(
            {name: t.new_full(t.shape, step / 2) for name, t in state.ema.state().items()}
        )
    told = TrainingState(state.model, state.optimiser, state.ema, {"querypatch": "{}"})
    named = {f"eval/{name}": value for name, value in metrics.items()}
    save_checkpoint(folder, take_snapshot(told, Position(step=step), 1), named, "digest")


def found(source: str | Path, *, best: bool = True) -> RunWeights:
    weights = run_weights(str(source), best=best)
    assert weights is not None
    return weights


def value_of(weights: RunWeights) -> float:
    (value,) = {float(tensor.unique().item()) for tensor in weights.tensors.values()}
    return value


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = open_run_folder(str(tmp_path / "run"))
    for step, ap in ((2, 0.1), (4, 0.3), (6, 0.2)):
        save(folder, step, ap=ap)
    return folder


def test_the_newest_is_taken_whatever_checkpoint_its_recipe_calls_the_best(run: RunFolder) -> None:
    run.write("recipe.yaml", b"checkpoints: {best_metric: eval/ap}\n")
    assert value_of(found(run.url)) == 6
    run.write("recipe.yaml", b"checkpoints: {keep_last: 3}\n")
    weights = found(run.url)
    assert (value_of(weights), weights.step, weights.metrics) == (6, 6, {"eval/ap": 0.2})
    assert weights.source == f"{run.url}/checkpoints/step_000006"
    assert weights.metadata["querypatch"] == "{}"


def test_the_file_of_best_weights_goes_before_all_checkpoints(run: RunFolder) -> None:
    with run.spool() as spool:
        save_file({"weight": torch.full((2,), 9.0)}, spool / "w", metadata={"step": "3"})
        run.put(spool / "w", "best/model.safetensors")
    weights = found(run.url)
    assert (value_of(weights), weights.metadata) == (9, {"step": "3"})
    assert weights.source == f"{run.url}/best/model.safetensors"
    assert found(run.url, best=False).step == 6


def test_a_moving_average_is_taken_in_place_of_live_weights(run: RunFolder) -> None:
    save(run, 8, ema=True)
    weights = found(run.url)
    assert (value_of(weights), weights.averaged) == (4, True)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    damage(run, 6)
    with caplog.at_level(logging.WARNING):
        assert found(run.url).step == 4
    assert "step_000006/model.safetensors is not what its manifest says" in caplog.text


def test_a_checkpoints_own_folder_is_taken_as_it_is_or_not_at_all(run: RunFolder) -> None:
    assert found(f"{run.url}/checkpoints/step_000002").step == 2
    damage(run, 4)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        found(f"{run.url}/checkpoints/step_000004")
    run.delete("checkpoints/step_000006/manifest.json")
    with pytest.raises(CheckpointError, match=r"step 6 has no manifest.*give the run's folder"):
        found(f"{run.url}/checkpoints/step_000006")


def test_a_run_without_a_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    folder.write("checkpoints/step_000001/model.safetensors", b"half")
    with pytest.raises(WeightsError, match="the run has no whole checkpoint"):
        run_weights(folder.url, best=True)


def test_files_and_other_folders_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    for place in (tmp_path / "w.pth", tmp_path, tmp_path / "none"):
        assert run_weights(str(place), best=True) is None


def test_an_exported_folder_gives_its_file_and_a_file_itself(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    place = str(tmp_path / "model.safetensors")
    assert weights_file(str(tmp_path)) == weights_file(place) == place
    assert weights_file(str(tmp_path / "none")) == str(tmp_path / "none")


def damage(run: RunFolder, step: int) -> None:
    file = Path(run.path(f"checkpoints/step_{step:06d}/model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
