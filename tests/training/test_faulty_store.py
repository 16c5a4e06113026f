"""A run's folder on a real S3 server with faults between: all of a file is there, or nothing."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.faulty_store import Fault, FaultyStore, Request, faulty_store, random_faults
from tests.servers import S3Store
from tests.training.small import CPU, small_state
from training.checkpoint import list_checkpoints, load_newest, resume
from training.checkpoint_writer import CheckpointWriter
from training.retention import RetentionSettings
from training.run_folder import Patience, RunFolder, StoreError, open_run_folder
from training.snapshot import Position
from training.uploads import Uploads
from training.world import World


@pytest.fixture(autouse=True)
def _own_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def quick(faulty: FaultyStore, attempts: int = 8) -> RunFolder:
    options = {**faulty.store.storage_options, "skip_instance_cache": True}
    config = {**options["config_kwargs"], "retries": {"max_attempts": 0}, "read_timeout": 5}  # type: ignore[dict-item]
    folder = open_run_folder(faulty.store.url, {**options, "config_kwargs": config})
    # s3fs asks again itself, for seconds: what is to be seen here is ours.
    folder.filesystem.retries = 1
    return replace(folder, patience=Patience(attempts, backoff_s=0.01))


def test_checkpoints_come_through_a_bad_day(s3_store: S3Store) -> None:
    with faulty_store(s3_store, random_faults(1, 0.3, seconds=0.01)) as faulty:
        folder = quick(faulty)
        uploads = Uploads()
        settings = RetentionSettings(keep_last=2)
        writer = CheckpointWriter(folder, uploads, settings, World.alone(CPU), "digest")
        state = small_state()
        for step in (1, 2, 3, 4):
            with torch.no_grad():
                state.model.head.weight.fill_(float(step))
            writer.save(state, Position(step=step), {"eval/ap": 0.1})
            writer.flush()
        writer.finish()
        uploads.close()
        assert len(faulty.counts) >= 6
    clean = open_run_folder(s3_store.url, s3_store.storage_options)
    assert uploads.failures == 0
    assert [manifest.step for manifest in list_checkpoints(clean)] == [4, 3]
    snapshot = load_newest(clean)
    assert snapshot is not None
    assert set(snapshot.model["head.weight"].flatten().tolist()) == {4.0}


def test_a_store_that_comes_back_gets_the_last_checkpoint(s3_store: S3Store) -> None:
    with faulty_store(s3_store) as faulty:
        folder = quick(faulty, attempts=2)
        uploads = Uploads()
        settings = RetentionSettings(keep_last=2, wait_for_store_minutes=1)
        writer = CheckpointWriter(folder, uploads, settings, World.alone(CPU), "digest")
        writer.save(small_state(), Position(step=1), {})
        writer.flush()
        faulty.is_away = True
        writer.save(small_state(), Position(step=2), {})
        writer.flush()
        assert uploads.failures == 1

        def come_back(seconds: float) -> None:
            faulty.is_away = False

        writer.finish(clock=lambda: 0.0, sleep=come_back)
        uploads.close()
        assert resume(folder, small_state(), World.alone(CPU)) == Position(step=2)


@pytest.mark.parametrize("kind", ["half_upload", "lost_answer", "cut"])
def test_a_file_whose_every_upload_fails_is_not_there_or_is_whole(
    s3_store: S3Store, kind: str
) -> None:
    def every_upload(request: Request) -> Fault:
        return Fault(kind if request.method == "PUT" else "none")  # type: ignore[arg-type]

    data = b"weights" * 1000
    with faulty_store(s3_store, every_upload) as faulty:
        folder = quick(faulty, attempts=2)
        if kind == "half_upload":
            with pytest.raises(StoreError, match="could not write"):
                folder.write("a", data)
        else:
            try:
                folder.write("a", data)
            except StoreError:
                assert kind == "lost_answer"
    clean = open_run_folder(s3_store.url, s3_store.storage_options)
    assert clean.size("a") == (None if kind == "half_upload" else len(data))
