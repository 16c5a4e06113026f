"""A store that is away is told of when it is back, and a run with another writer ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.writing import Writing, writing
from tests.pretrain.small_run import small_recipe
from training.history import History, read_history
from training.lease import LeaseLost, read_lease
from training.run_folder import open_run_folder
from training.stopping import StopFlag


def test_a_store_that_is_away_is_told_once_with_how_long_it_was(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    lease, silent_s = _lease()
    with History(folder) as history:
        work = Writing(history, StopFlag(), lease)
        for silent_s[0] in (4.0, 21.0, 60.0, 95.0, 1.0, 4.0, 30.0):
            work.check_lease()
    told = [(event.kind, event.facts) for event in read_history(folder)]
    assert told == [("store_away", {}), ("store_back", {"seconds": 95}), ("store_away", {})]


def test_a_run_that_another_has_taken_over_ends(tmp_path: Path) -> None:
    lease, _ = _lease(lost="runs/a was taken over by job b")
    with History(open_run_folder(str(tmp_path))) as history:
        work = Writing(history, StopFlag(), lease)
        with pytest.raises(LeaseLost, match="taken over by job b"):
            work.check_lease()


@pytest.mark.parametrize("signal", [SystemExit(15), KeyboardInterrupt()])
def test_a_run_that_a_second_signal_ends_says_so_and_lets_go_of_its_lease(
    signal: BaseException, tmp_path: Path
) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    recipe = small_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(type(signal)), writing(recipe, folder, Console(quiet=True)):
        raise signal
    last = read_history(folder)[-1]
    assert (last.kind, last.text) == ("failed", "ended by a second signal, without a checkpoint")
    lease = read_lease(folder)
    assert lease is not None
    assert lease.is_released


def _lease(lost: str | None = None) -> tuple[Any, list[float]]:
    silent_s = [0.0]
    return SimpleNamespace(lost=lambda: lost, silent_s=lambda: silent_s[0]), silent_s
