"""SIGKILL at any instant: a run's newest checkpoint is whole."""

import itertools
import random
import time
from pathlib import Path

import torch

from tests.training.small import small_state
from tests.training.workers import workers_context
from training.checkpoint import delete_expired, load_newest, save_checkpoint
from training.retention import RetentionSettings
from training.run_folder import open_run_folder
from training.snapshot import Position, Snapshot, take_snapshot

KILLS = 12


class BigLine(torch.nn.Linear):
    """Large enough, 1 MB, that a kill often meets a half-written file."""

    def __init__(self) -> None:
        super().__init__(512, 512)


def filled(step: int) -> Snapshot:
    state = small_state(model=BigLine())
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(float(step))
    return take_snapshot(state, Position(step=step), world_size=1)


def write_for_ever(url: str, first_step: int) -> None:
    torch.set_num_threads(1)
    folder = open_run_folder(url)
    for step in itertools.count(first_step):
        save_checkpoint(folder, filled(step), {}, "digest")
        delete_expired(folder, RetentionSettings(keep_last=2))


def newest_begun(root: Path) -> int:
    """The newest step with anything of a checkpoint; older ones may be gone when we look."""
    found = (int(path.name.removeprefix("step_")) for path in root.glob("checkpoints/step_*"))
    return max(found, default=0)


def test_killed_while_it_writes_the_newest_checkpoint_is_always_whole(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    context = workers_context()
    dice = random.Random(5)
    newest, caught_writing = 0, 0
    for _ in range(KILLS):
        writer = context.Process(target=write_for_ever, args=(folder.url, newest + 1))
        writer.start()
        begun = newest + dice.randint(1, 3)
        while newest_begun(Path(folder.root)) < begun:
            time.sleep(0.001)
            assert writer.is_alive()
        time.sleep(dice.uniform(0, 0.05))
        writer.kill()
        writer.join()
        caught_writing += any(Path(folder.root).glob(".writing-*"))
        snapshot = load_newest(folder)
        found = snapshot.position.step if snapshot else 0
        assert found >= newest
        if snapshot:
            assert snapshot.model["weight"].unique().tolist() == [float(found)]
        newest = found
    assert newest > KILLS / 2
    assert caught_writing > KILLS / 3
    folder.clear_spool()
    assert folder.names("") == ["checkpoints"]
