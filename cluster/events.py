"""What happens to the workers, as Ray Train's controller sees it, told to the board.

An object of this class is sent to the controller and called there. It also brings about that
nothing is lost where that can be helped: a checkpoint when a machine announces its end, and one
before a group that could grow is taken down. Nothing that goes wrong in here may end the run, so
every call of an actor is either not waited for or bounded.
"""

import logging
import textwrap
import time
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

from cluster.board import Happening, Stored
from cluster.preemption import Notice, wanted

logger = logging.getLogger(__name__)

_CAUSES = ("The actor is dead because", "The actor died because")
"""How the line of Ray's report begins that says why a process is gone."""

RESIZE_WAIT_S = 120.0
"""Longest wait for the checkpoint before a resize; what it lacks then is computed again."""


class RayEvents(ControllerCallback, WorkerGroupCallback):
    """Tells the board of workers that start, are lost, have notice, and become more or fewer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._notice: Notice | None = None
        self._requester = ""
        self._workers = 0
        self._waits = False

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Remembers the run by the name that it asks for machines with."""
        self._requester = f"train-{train_run_context.run_id}"

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """A new group of workers is about to train."""
        workers = worker_group.get_workers()
        nodes = {worker.metadata.node_id for worker in workers}
        self._workers, self._notice, self._waits = len(workers), None, False
        text = f"{_count(len(workers), 'worker')} on {_count(len(nodes), 'machine')}"
        self._tell(Happening("workers", text, facts={"count": len(workers), "nodes": len(nodes)}))

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """What the controller found, or is about to do."""
        match current_state:
            case RestartingState():
                if not isinstance(previous_state, RestartingState):
                    self._tell(_loss(current_state.training_failed_error))
                self._look_again()
            case ReschedulingState():
                if not self._waits:
                    self._waits = True
                    self._tell(Happening("waiting", "the machines for the workers are not there"))
                self._look_again()
            case PreemptingState():
                self._hear_notice(current_state)
            case ResizingState():
                self._before_resize(current_state)

    def _hear_notice(self, state: PreemptingState) -> None:
        info = state.preemption_info
        ends_at = None if info.deadline_ms is None else info.deadline_ms / 1000
        if self._notice is None:
            self._notice = Notice(ends_at)
            left_s = None if ends_at is None else round(ends_at - time.time(), 1)
            when = "soon" if left_s is None else f"in {left_s:.0f} s"
            ranks = sorted(info.preempted_ranks)
            text = f"the machines of {_count(len(ranks), 'worker')} of {self._workers} go {when}"
            self._tell(Happening("preemption_notice", text, facts={"seconds": left_s}))
        is_wanted, self._notice = wanted(self._notice, time.time())
        if is_wanted:
            self._board.want_checkpoint.remote()

    def _before_resize(self, state: ResizingState) -> None:
        decision = state.scaling_decision
        count = decision.num_workers if isinstance(decision, ResizeDecision) else self._workers
        earlier = self._stored()
        self._board.want_checkpoint.remote()
        deadline = time.monotonic() + RESIZE_WAIT_S
        while earlier is not None and time.monotonic() < deadline:
            time.sleep(0.3)
            now = self._stored()
            if now is None or now.count > earlier.count:
                break
        text = f"from {self._workers} to {_count(count, 'worker')}"
        self._tell(Happening("resized", text, facts={"before": self._workers, "after": count}))

    def _stored(self) -> Stored | None:
        try:
            stored: Stored = ray.get(self._board.stored.remote(), timeout=10)
        except (RayError, GetTimeoutError) as error:
            logger.warning("no word of the last checkpoint: %s", error)
            return None
        return stored

    def _tell(self, happening: Happening) -> None:
        self._board.tell.remote(happening)

    def _look_again(self) -> None:
        """Has Ray look for machines now: it would only every 20 s, and plan with lost ones."""
        try:
            coordinator = ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")
        except ValueError:
            return
        coordinator.get_reserved_resources.remote(self._requester, recompute=True)


def _loss(error: TrainingFailedError) -> Happening:
    if isinstance(error, PreemptionError):
        facts: dict[str, object] = {"announced": True}
        return Happening("worker_lost", "machines went, as they had announced", facts=facts)
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return Happening("worker_lost", _first_line(error), facts={"announced": False})
    failures = error.worker_failures
    deaths = [
        found for found in failures.values() if isinstance(found, WorkerHealthCheckFailedError)
    ]
    causes = [death.health_check_failure for death in deaths]
    announced = any(isinstance(cause, RayActorError) and cause.preempted for cause in causes)
    # Where one worker dies the others fail too, for want of it: the dead one is the news.
    cause = (causes or list(failures.values()))[0]
    lost = f"{_count(len(deaths), 'worker')} died" if deaths else f"{len(failures)} failed"
    facts = {"announced": announced, "ranks": sorted(failures)}
    return Happening("worker_lost", f"{lost}: {_first_line(cause)}", facts=facts)


def _first_line(error: BaseException) -> str:
    """Of a dead process what Ray knows of its end, which stands further down."""
    if isinstance(error, ActorUnavailableError):
        # Ray says at length which addresses and ids did not answer.
        return "its machine, or its process, does not answer any more"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(_CAUSES)] or lines
    return textwrap.shorten(told[0], 240, placeholder=" ...") if told else type(error).__name__


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
