"""The board, and the first worker's side of it, with calls that arrive when the test says so."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ResizingState,
    RestartingState,
    RunningState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

import cluster.board
import cluster.events
from cluster.board import Board, BoardDisplay, CutOff, Happening, Message, Stored
from cluster.events import RayEvents


@dataclass
class Call:
    """A call of an actor that has been sent."""

    result: Any = None
    has_arrived: bool = True


@dataclass
class Handle:
    """Stands for the handle of a board; calls arrive at once unless it is told otherwise."""

    board: Board = field(default_factory=Board)
    is_away: bool = False
    is_dead: bool = False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: self._call(name, *given))

    def _call(self, name: str, *given: Any) -> Call:
        if self.is_dead:
            return Call(RayActorError())
        if self.is_away:
            return Call(has_arrived=False)
        return Call(getattr(self.board, name)(*given))


class FakeRay:
    """What the code asks of `ray`."""

    @staticmethod
    def wait(calls: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        ready = [call for call in calls if call.has_arrived]
        return ready, [call for call in calls if not call.has_arrived]

    @staticmethod
    def get(call: Call, timeout: float | None = None) -> Any:
        if isinstance(call.result, Exception):
            raise call.result
        return call.result

    @staticmethod
    def get_actor(name: str, namespace: str) -> Any:
        raise ValueError("no such actor")


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.board, "ray", FakeRay)
    monkeypatch.setattr(cluster.events, "ray", FakeRay)


def test_a_wish_for_a_checkpoint_reaches_the_worker_once_and_a_stop_stays() -> None:
    handle, now = Handle(), [0.0]
    display = BoardDisplay(handle, lambda: now[0]).begin(3, 9)
    handle.board.want_checkpoint()
    found = []
    for second in range(4):
        now[0] = float(second)
        if second == 2:
            handle.board.take(stop=True)
        found.append((display.stop_requested(), display.checkpoint_wanted()))
    assert found == [(False, False), (False, True), (False, False), (True, False)]


def test_what_nobody_took_yet_stays_on_the_board() -> None:
    board = Board()
    board.pin(Message("a", 0, 9, 1, notes=("one",)))
    board.pin(Message("a", 0, 9, 2, notes=("two",)))
    board.tell(Happening("hung", "x"))
    board.tell_stored(4)
    taken = board.take()
    assert taken.message is not None
    assert (taken.message.step, taken.message.notes) == (2, ("one", "two"))
    assert [happening.kind for happening in taken.happenings] == ["hung"]
    assert taken.stored == Stored(1, 4)
    again = board.take()
    assert (again.message, again.happenings, again.stored) == (None, (), Stored(1, 4))


def test_a_worker_without_an_answer_for_long_takes_itself_for_cut_off() -> None:
    handle, now = Handle(), [0.0]
    display = BoardDisplay(handle, lambda: now[0], patience_s=30.0).begin(0, 9)
    display.stop_requested()
    handle.is_away = True
    now[0] = 1.0
    display.stop_requested()
    now[0] = 31.0
    assert display.stop_requested() is False
    now[0] = 31.5
    with pytest.raises(CutOff, match="no word from the job's driver for 30 s"):
        display.stop_requested()


def test_a_lost_board_costs_its_answers_alone(caplog: pytest.LogCaptureFixture) -> None:
    handle, now = Handle(), [0.0]
    display = BoardDisplay(handle, lambda: now[0]).begin(0, 9)
    handle.is_dead = True
    for second in range(3):
        now[0] = float(second)
        assert display.stop_requested() is False
    handle.is_dead = False
    handle.board.take(stop=True)
    found = []
    for second in range(3, 6):
        now[0] = float(second)
        found.append(display.stop_requested())
    assert found == [False, True, True]
    assert "the progress board is lost" in caplog.text


def test_the_dead_worker_is_the_news_not_those_that_miss_it() -> None:
    handle = Handle()
    error = WorkerGroupError(
        "text",
        {
            0: RuntimeError("Connection reset by peer"),
            1: WorkerHealthCheckFailedError("checked", RayActorError(error_msg="it was killed")),
        },
    )
    RayEvents(handle).after_controller_state_update(RunningState(), RestartingState(error))
    (loss,) = handle.board.take().happenings
    assert (loss.kind, loss.text) == ("worker_lost", "1 worker died: it was killed")
    assert loss.facts == {"announced": False, "ranks": [0, 1]}


def test_a_notice_wants_a_checkpoint_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.events.time, "time", lambda: 1000.0)
    handle = Handle()
    state = PreemptingState(PreemptionInfo(1_090_000, {"node": [1]}), 1000.0)
    events = RayEvents(handle)
    for _ in range(3):
        events.after_controller_state_update(RunningState(), state)
    assert handle.board.pin(Message("a", 0, 9, 1)).checkpoint
    (notice,) = handle.board.take().happenings
    assert (notice.kind, notice.facts) == ("preemption_notice", {"seconds": 90.0})


def test_a_group_that_can_grow_writes_a_checkpoint_before_it_is_taken_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = Handle()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3 and handle.board.pin(Message("a", 0, 9, 7)).checkpoint:
            handle.board.tell_stored(7)

    monkeypatch.setattr(cluster.events.time, "sleep", sleep)
    decision = ResizeDecision(num_workers=5, resources_per_worker={"CPU": 1})
    RayEvents(handle).after_controller_state_update(RunningState(), ResizingState(decision))
    assert len(waits) == 3
    (resized,) = handle.board.take().happenings
    assert (resized.kind, resized.facts["after"]) == ("resized", 5)
