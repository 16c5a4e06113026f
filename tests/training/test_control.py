"""Asking a run to stop through its folder."""

import threading
from pathlib import Path

from tests.training.stumbling_store import Moods, stumbling_folder
from training.control import StopRequest, ask_to_stop, clear_stop, stop_asked, stop_on_request
from training.run_folder import open_run_folder


def test_a_request_is_there_until_the_next_start(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    assert stop_asked(folder) is None
    ask_to_stop(folder, "anna", now=lambda: "2026-11-26T04:00:00.000Z")
    assert stop_asked(folder) == StopRequest("anna", "2026-11-26T04:00:00.000Z")
    clear_stop(folder)
    clear_stop(folder)
    assert stop_asked(folder) is None


def test_a_file_made_by_hand_asks_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control/stop.json").write_text("")
    folder = open_run_folder(str(tmp_path))
    assert stop_asked(folder) == StopRequest("somebody", "")
    (tmp_path / "control/stop.json").write_text("[1]")
    assert stop_asked(folder) == StopRequest("somebody", "")


def test_a_store_that_is_away_has_asked_for_nothing() -> None:
    folder = stumbling_folder(Moods())
    ask_to_stop(folder, "anna")
    folder.filesystem.cat_file = _away
    assert stop_asked(folder) is None


def test_a_request_is_heard_once_inside_the_block(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    heard: list[str] = []
    event = threading.Event()

    def ask(request: StopRequest) -> None:
        heard.append(request.by)
        event.set()

    with stop_on_request(folder, ask, every_s=0.01):
        assert not event.wait(0.05)
        ask_to_stop(folder, "anna")
        assert event.wait(5)
    assert heard == ["anna"]
    event.clear()
    with stop_on_request(folder, ask, every_s=60.0):
        pass
    assert not event.is_set()


def _away(path: str) -> bytes:
    raise OSError("503 slow down")
