"""Checkpoints are whole or absent, whatever the store does, and come back bit for bit."""

import hashlib
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.small import CPU, DropoutLine, small_state
from tests.training.stumbling_store import Killed, Moods, stumbling_folder
from training.checkpoint import (
    delete_expired,
    list_checkpoints,
    load_newest,
    newest_checkpoint,
    resume,
    save_checkpoint,
)
from training.ema import EmaSettings
from training.retention import RetentionSettings
from training.run_folder import RunFolder, StoreError, open_run_folder
from training.snapshot import CheckpointError, Position, Snapshot, load_weights, take_snapshot
from training.world import World

ALONE = World.alone(CPU)


def snapshot_at(step: int) -> Snapshot:
    """A snapshot whose weights all say which step they are of."""
    state = small_state(EmaSettings())
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(float(step))
    return take_snapshot(state, Position(step=step, pictures=3 * step), world_size=2)


def save(folder: RunFolder, step: int, **metrics: float) -> None:
    save_checkpoint(folder, snapshot_at(step), metrics, "digest")


def newest_step(folder: RunFolder) -> int | None:
    """The step of the newest whole checkpoint, after a look at every weight."""
    snapshot = load_newest(folder)
    if snapshot is None:
        return None
    values = torch.cat([tensor.flatten() for tensor in snapshot.model.values()]).unique()
    assert values.tolist() == [float(snapshot.position.step)]
    return snapshot.position.step


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    if request.param == "local":
        return open_run_folder(str(tmp_path / "run"))
    return stumbling_folder(Moods())


def test_everything_comes_back_bit_for_bit(folder: RunFolder) -> None:
    state = small_state(EmaSettings(decay=0.5))
    state.model(torch.ones(2, 4)).sum().backward()
    state.optimiser.step()
    state.ema.update(3)
    position = Position(step=12, epoch=2, batch=2, pictures=36, skipped=1, bad_steps=2)
    save_checkpoint(folder, take_snapshot(state, position, 2), {"eval/ap": 0.25}, "abc")

    other = small_state(EmaSettings(decay=0.5), model=DropoutLine())
    assert resume(folder, other, ALONE) == position
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor)
        assert torch.equal(other.ema.model.state_dict()[name], state.ema.model.state_dict()[name])
    ours, theirs = (s.optimiser.state_dict()["state"] for s in (other, state))
    assert ours.keys() == theirs.keys()
    for number, moments in theirs.items():
        for name, tensor in moments.items():
            assert torch.equal(ours[number][name], tensor)
    manifest = newest_checkpoint(folder)
    assert manifest is not None
    assert (manifest.step, manifest.metrics, manifest.recipe_digest) == (
        12,
        {"eval/ap": 0.25},
        "abc",
    )
    assert sorted(folder.names("checkpoints/step_000012")) == [
        "manifest.json",
        "model.safetensors",
        "state.pt",
    ]


def test_a_metric_that_is_not_a_number_does_not_spoil_the_manifest(folder: RunFolder) -> None:
    save(folder, 1, ap=float("nan"), recall=0.5)
    (manifest,) = list_checkpoints(folder)
    assert manifest.metrics == {"recall": 0.5}


def test_a_new_run_starts_at_the_start(folder: RunFolder) -> None:
    assert newest_checkpoint(folder) is None
    assert resume(folder, small_state(), ALONE) == Position()


def test_a_snapshot_is_not_touched_by_further_training() -> None:
    state = small_state(EmaSettings())
    snapshot = take_snapshot(state, Position(), 1)
    before = snapshot.model["head.weight"].clone()
    with torch.no_grad():
        for parameter in [*state.model.parameters(), *state.ema.model.parameters()]:
            parameter.add_(1.0)
    assert torch.equal(snapshot.model["head.weight"], before)
    assert torch.equal(snapshot.ema["head.weight"], before)


def test_killed_at_any_write_the_newest_checkpoint_is_whole() -> None:
    kills = 0
    for kill_at in range(100):
        moods = Moods()
        folder = stumbling_folder(moods)
        save(folder, 1)
        save(folder, 2)
        moods.kill_at, moods.writes = kill_at, 0
        try:
            for step in (3, 2, 4):  # 2 is written again, as after a fall-back to 1
                save(folder, step)
                delete_expired(folder, RetentionSettings(keep_last=1))
        except Killed:
            kills += 1
            moods.kill_at = None
            assert newest_step(folder) in (2, 3, 4)
        else:
            break
    assert newest_step(folder) == 4
    assert kills == moods.writes > 12


def test_a_store_that_stumbles_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    moods = Moods(fail_puts=2)
    folder = stumbling_folder(moods)
    save(folder, 1)
    assert newest_step(folder) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "write stumbling://run/checkpoints/step_000001/model.safetensors: OSError: 503 slow down"
    ] * 2


def test_a_put_that_cuts_a_file_is_noticed_and_repeated(caplog: pytest.LogCaptureFixture) -> None:
    folder = stumbling_folder(Moods(cut_puts=1))
    save(folder, 1)
    assert newest_step(folder) == 1
    assert "StoreError: the store holds" in caplog.text


def test_a_store_that_stays_down_leaves_no_checkpoint_and_the_older_one_counts() -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    save(folder, 1)
    for broken in (Moods(fail_puts=99), Moods(cut_puts=99)):
        moods.fail_puts, moods.cut_puts = broken.fail_puts, broken.cut_puts
        with pytest.raises(StoreError, match=r"could not write .*model\.safetensors in 3 attempts"):
            save(folder, 2)
        assert newest_step(folder) == 1


def test_a_missing_right_is_told_at_once() -> None:
    moods = Moods(fail_puts=1, error=PermissionError("AccessDenied"))
    with pytest.raises(StoreError, match=r"may not write .*AccessDenied; check the credentials"):
        save(stumbling_folder(moods), 1)
    assert moods.writes == 1
    moods.fail_puts, moods.error = 1, FileNotFoundError("NoSuchBucket")
    with pytest.raises(StoreError, match=r"NoSuchBucket; does the bucket exist\?"):
        save(stumbling_folder(moods), 1)


def spoil(folder: RunFolder, name: str, data: bytes | None) -> None:
    path = folder.path(f"checkpoints/{name}")
    if data is None:
        folder.filesystem.rm_file(path)
    else:
        folder.filesystem.pipe_file(path, data)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("model.safetensors", b"short", r"model\.safetensors has 5 of \d+ bytes"),
        ("state.pt", None, r"state\.pt is missing"),
        ("manifest.json", b'{"format": 1,', r"manifest\.json is not a manifest of ours: the file"),
        (
            "manifest.json",
            b'{"format": 2, "step": 3, "files": {}}',
            r"manifest\.json is not a manifest of ours: format: Input should be 1",
        ),
    ],
)
def test_a_spoilt_checkpoint_is_passed_over_and_named(
    folder: RunFolder,
    caplog: pytest.LogCaptureFixture,
    name: str,
    data: bytes | None,
    reason: str,
) -> None:
    save(folder, 2)
    save(folder, 3)
    spoil(folder, f"step_000003/{name}", data)
    assert newest_step(folder) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    caplog_text = record.getMessage()
    assert caplog_text.startswith("passing over a checkpoint: ")
    assert re.search(reason, caplog_text)


def test_one_changed_byte_is_found_by_its_hash(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 2)
    save(folder, 3)
    data = bytearray(folder.read("checkpoints/step_000003/model.safetensors"))
    data[-1] ^= 1
    spoil(folder, "step_000003/model.safetensors", bytes(data))
    assert newest_step(folder) == 2
    assert "model.safetensors is not what its manifest says: sha256 differs" in caplog.text


def test_a_half_written_checkpoint_is_passed_over_in_silence(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 2)
    save(folder, 3)
    spoil(folder, "step_000003/manifest.json", None)
    assert newest_step(folder) == 2
    assert not caplog.records


def test_if_no_checkpoint_is_whole_the_run_does_not_start_afresh_by_itself(
    folder: RunFolder,
) -> None:
    save(folder, 2)
    spoil(folder, "step_000002/state.pt", None)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints is whole"):
        load_newest(folder)


def test_a_first_checkpoint_whose_manifest_is_cut_was_never_finished(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 2)
    manifest = folder.read("checkpoints/step_000002/manifest.json")
    spoil(folder, "step_000002/manifest.json", manifest[: len(manifest) // 2])
    assert load_newest(folder) is None
    assert "the first checkpoint was never finished" in caplog.text
    save(folder, 2)
    assert newest_step(folder) == 2


def test_of_several_checkpoints_with_cut_manifests_nobody_starts_afresh(folder: RunFolder) -> None:
    for step in (2, 3):
        save(folder, step)
        spoil(folder, f"step_00000{step}/manifest.json", b'{"format": 1, "st')
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        load_newest(folder)


@pytest.mark.parametrize(
    ("content", "reason"), [({"epoch": 3}, "KeyError: 'optimiser'"), (Path("x"), "UnpicklingError")]
)
def test_other_peoples_files_under_a_true_manifest_are_refused(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, content: object, reason: str
) -> None:
    save(folder, 2)
    file = io.BytesIO()
    torch.save(content, file)
    data = file.getvalue()
    spoil(folder, "step_000002/state.pt", data)
    place = "checkpoints/step_000002/manifest.json"
    manifest = json.loads(folder.read(place))
    manifest["files"]["state.pt"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    folder.write(place, json.dumps(manifest).encode())
    with pytest.raises(CheckpointError, match="none of the 1"):
        load_newest(folder)
    assert f"step_000002 is not a checkpoint of ours: {reason}" in caplog.text


def test_a_checkpoint_of_another_model_is_one_clear_line(folder: RunFolder) -> None:
    save(folder, 2)
    state = small_state(model=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError) as caught:
        resume(folder, state, ALONE)
    assert str(caught.value) == (
        f"{folder.url}/checkpoints/step_000002 is of another model, tensors 2 missing (0.weight), "
        "4 unknown (backbone.bias); use that run's recipe"
    )


def test_weights_of_another_shape_are_named_and_none_is_copied() -> None:
    model = nn.Linear(3, 2)
    before = model.bias.clone()
    with pytest.raises(
        CheckpointError,
        match=r"it is of another model, tensors 1 of another shape \(weight, 2x4 and not 2x3\)",
    ):
        load_weights(model, {"weight": torch.zeros(2, 4), "bias": torch.ones(2)}, "it")
    assert torch.equal(model.bias, before)


def test_retention_deletes_what_no_rule_keeps_and_older_remains(folder: RunFolder) -> None:
    for step, ap in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        save(folder, step, ap=ap)
    spoil(folder, "step_000001/manifest.json", None)  # half-written, or half-deleted
    delete_expired(folder, RetentionSettings(keep_last=1, best_metric="ap"))
    filled = [name for name in folder.names("checkpoints") if folder.names(f"checkpoints/{name}")]
    assert filled == ["step_000002", "step_000004"]
    assert [manifest.step for manifest in list_checkpoints(folder)] == [4, 2]


def test_a_folder_with_nothing_but_what_a_killed_writer_left_half_prepared_goes_too(
    tmp_path: Path,
) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    left = tmp_path / "run" / "checkpoints" / "step_000001" / ".writing-manifest.json-123-abc"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"{")
    save(folder, 2)
    delete_expired(folder, RetentionSettings(keep_last=1))
    assert folder.names("checkpoints") == ["step_000002"]


def test_foreign_names_among_the_checkpoints_are_left_alone(folder: RunFolder) -> None:
    save(folder, 5)
    folder.write("checkpoints/step_best/notes.txt", b"mine")
    folder.write("checkpoints/readme.txt", b"mine")
    delete_expired(folder, RetentionSettings(keep_last=1))
    assert folder.names("checkpoints") == ["readme.txt", "step_000005", "step_best"]


def test_a_resume_with_an_average_needs_one(folder: RunFolder) -> None:
    save_checkpoint(folder, replace(snapshot_at(2), ema=None), {}, "digest")
    with pytest.raises(CheckpointError, match="the moving average is of another model"):
        resume(folder, small_state(EmaSettings()), ALONE)
