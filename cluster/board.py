"""The board between a job's driver, its first worker and Ray Train's controller.

One small Ray actor per job, on the driver's node. The worker pins up what there is to show, and
reads whether it should stop or write a checkpoint; the controller tells what happens to the workers
(`cluster.events`); the driver takes it all down. Training never waits for the board: a message is
sent only when the last one has arrived. A board that was lost is started again and costs what was
pinned up and not yet taken.
"""

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayActorError

from training.history import Kind
from training.metrics import StepRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """What there is to show since the last message."""

    attempt: str
    """Tells the starts of the workers from each other."""
    start_step: int
    """Updates that were done when this start of the workers began."""
    total_steps: int
    step: int
    """Updates done."""
    record: StepRecord | None = None
    """The newest record, if there is a new one."""
    notes: tuple[str, ...] = ()
    """Lines for the log."""


@dataclass(frozen=True)
class Happening:
    """Something for the run's history."""

    kind: Kind
    text: str
    step: int | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """The checkpoints that were stored during the job."""

    count: int = 0
    step: int = 0
    """Of the last one."""


@dataclass(frozen=True)
class Answer:
    """What the board has for the first worker."""

    stop: bool = False
    """The run shall write a checkpoint and end."""
    checkpoint: bool = False
    """It shall write a checkpoint and go on."""


@dataclass(frozen=True)
class Taken:
    """What the board has for the driver."""

    message: Message | None
    happenings: tuple[Happening, ...]
    stored: Stored
    failure: str | None
    """Why starting again would not help, if so."""


class Board:
    """Holds what was pinned up and not yet taken; run as a Ray actor."""

    def __init__(self) -> None:
        self._message: Message | None = None
        self._happenings: tuple[Happening, ...] = ()
        self._stored = Stored()
        self._stop = False
        self._wants_checkpoint = False
        self._failure: str | None = None

    def pin(self, message: Message) -> Answer:
        """The first worker's: pin up a message; what nobody took yet stays."""
        if self._message is not None:
            record = message.record or self._message.record
            message = replace(message, record=record, notes=self._message.notes + message.notes)
        self._message = message
        answer = Answer(self._stop, self._wants_checkpoint)
        self._wants_checkpoint = False
        return answer

    def take(self, stop: bool = False) -> Taken:
        """The driver's: what was pinned up since the last call; `stop` asks the run to end."""
        self._stop = self._stop or stop
        taken = Taken(self._message, self._happenings, self._stored, self._failure)
        self._message, self._happenings = None, ()
        return taken

    def tell(self, happening: Happening) -> None:
        """Anybody's: something for the history."""
        self._happenings = (*self._happenings, happening)

    def fail(self, reason: str) -> None:
        """A worker's: starting again would fail in the same way; the first reason counts."""
        self._failure = self._failure or reason

    def want_checkpoint(self) -> None:
        """Anybody's: the run shall write a checkpoint soon, whatever its rhythm."""
        self._wants_checkpoint = True

    def tell_stored(self, step: int) -> None:
        """The first worker's: the checkpoint of this step is in the store."""
        self._stored = Stored(self._stored.count + 1, step)

    def stored(self) -> Stored:
        """The checkpoints so far."""
        return self._stored


class CutOff(ConnectionError):  # noqa: N818
    """The first worker hears nothing of its job any more."""


@dataclass
class BoardDisplay:
    """The first worker's side: shows a run on the board, and hears what the run shall do."""

    board: Any
    """Handle of the actor."""
    clock: Callable[[], float]
    interval_s: float = 0.5
    """Least time between two messages."""
    patience_s: float = 30.0
    """Time without an answer after which the worker takes itself for cut off."""
    _message: Message = field(default_factory=lambda: Message("", 0, 0, 0))
    _sent_at: float = float("-inf")
    _ref: Any = None
    _answer: Answer = field(default_factory=Answer)

    def begin(self, start_step: int, total_steps: int) -> Self:
        """The start of a run; use what it returns in a `with` block."""
        self._message = Message(secrets.token_hex(4), start_step, total_steps, start_step)
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
        """Whether the run is asked to stop, as of the last answer; sends what is to be shown.

        Raises:
            CutOff: there has been no answer for `patience_s`. Somebody else may have been started
                in this worker's place by now: it must not write to the run.
        """
        self._exchange()
        return self._answer.stop

    def checkpoint_wanted(self) -> bool:
        """Whether somebody wants a checkpoint now; True once for each wish."""
        wanted = self._answer.checkpoint
        self._answer = replace(self._answer, checkpoint=False)
        return wanted

    def _exchange(self) -> None:
        waited_s = self.clock() - self._sent_at
        if self._ref is not None and not ray.wait([self._ref], timeout=0)[0]:
            if waited_s > self.patience_s:
                raise CutOff(
                    f"no word from the job's driver for {waited_s:.0f} s: this worker is cut off, "
                    "and ends lest it writes beside the one that takes its place"
                )
            return
        if waited_s >= self.interval_s:
            self._read_answer()
            self._send()

    def _send(self) -> None:
        self._ref = self.board.pin.remote(self._message)
        self._message = replace(self._message, record=None, notes=())
        self._sent_at = self.clock()

    def _read_answer(self) -> None:
        if self._ref is None:
            return
        try:
            answer: Answer = ray.get(self._ref)
        except RayActorError as error:
            logger.warning("the progress board is lost, the run goes on: %s", error)
            return
        self._answer = Answer(
            stop=self._answer.stop or answer.stop,
            checkpoint=self._answer.checkpoint or answer.checkpoint,
        )
