"""The board between a job's driver and its first worker: how far the run is, and "please stop".

One small Ray actor per job. The worker pins up what there is to show and reads whether it should
stop; the driver takes it down for its progress bar. Training never waits for the board: a message
is sent only when the last one has arrived, and a lost board costs the bar alone.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayActorError

from training.metrics import StepRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """What there is to show since the last message."""

    start_step: int
    """Updates that were done when this start of the run began."""
    total_steps: int
    step: int
    """Updates done."""
    record: StepRecord | None = None
    """The newest record, if there is a new one."""
    notes: tuple[str, ...] = ()
    """Lines for the log."""


class Board:
    """Holds what was pinned up and not yet taken, and one stop request; run as a Ray actor."""

    def __init__(self) -> None:
        self._message: Message | None = None
        self._stop = False
        self._failure: str | None = None

    def pin(self, message: Message) -> bool:
        """Pin up a message; what nobody took yet stays. True if the run is asked to stop."""
        if self._message is not None:
            record = message.record or self._message.record
            message = replace(message, record=record, notes=self._message.notes + message.notes)
        self._message = message
        return self._stop

    def take(self) -> Message | None:
        """What was pinned up since the last call."""
        message, self._message = self._message, None
        return message

    def fail(self, reason: str) -> None:
        """Say that starting again would fail in the same way; the first reason counts."""
        self._failure = self._failure or reason

    def failure(self) -> str | None:
        """Why starting again would not help, if so."""
        return self._failure

    def request_stop(self) -> None:
        """Ask the run to write a checkpoint and end."""
        self._stop = True


@dataclass
class BoardDisplay:
    """The first worker's side: shows a run on the board, and hears of a stop."""

    board: Any
    """Handle of the actor."""
    clock: Callable[[], float]
    interval_s: float = 0.5
    """Least time between two messages."""
    _message: Message = field(default_factory=lambda: Message(0, 0, 0))
    _sent_at: float = float("-inf")
    _answer: Any = None
    _stop: bool = False

    def begin(self, start_step: int, total_steps: int) -> Self:
        """The start of a run; use what it returns in a `with` block."""
        self._message = Message(start_step, total_steps, start_step)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._send()

    def show(self, record: StepRecord) -> None:
        """The steps since the last record."""
        self._message = replace(self._message, record=record, step=record.step)

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        self._message = replace(self._message, step=step)

    def note(self, text: str) -> None:
        """Something that happens once."""
        self._message = replace(self._message, notes=(*self._message.notes, text))

    def stop_requested(self) -> bool:
        """Whether the driver asked to stop, as of the last answer; sends what is to be shown."""
        is_answered = self._answer is None or ray.wait([self._answer], timeout=0)[0]
        if is_answered and self.clock() - self._sent_at >= self.interval_s:
            self._read_answer()
            self._send()
        return self._stop

    def _send(self) -> None:
        self._answer = self.board.pin.remote(self._message)
        self._message = replace(self._message, record=None, notes=())
        self._sent_at = self.clock()

    def _read_answer(self) -> None:
        if self._answer is None:
            return
        try:
            self._stop = self._stop or ray.get(self._answer)
        except RayActorError as error:
            logger.warning("the progress board is lost, the run goes on: %s", error)
