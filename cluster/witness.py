"""What a run goes through, written into its history: of a job through Ray, and of a run alone.

The one place where the news of a run become events: from the messages and happenings of the board,
or from the display of a run in this process. Also counts the starts that came to nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from cluster.board import Happening, Message, Taken
from training.history import History, Kind
from training.metrics import StepRecord
from training.progress import Bar, PlainLines


def _silent(text: str) -> None:
    """Nobody waits."""


@dataclass
class Witness:
    """Follows one start of a run."""

    history: History
    max_restarts: int
    """Starts of the workers, one after another without a new checkpoint, that are tried."""
    say: Callable[[str], None] = _silent
    """Told what happens to the workers, in a line for the person who waits."""
    clock: Callable[[], float] = time.monotonic
    _since: float = field(init=False)
    """When that began which the next first step ends: the job, or the last loss."""
    _message: Message | None = None
    _reached: int = 0
    """The last step of the start before this one."""
    _awaits_step: bool = True
    _stored: int = 0
    _in_vain: int = 0
    _record: StepRecord | None = None

    def __post_init__(self) -> None:
        self._since = self.clock()

    def see(self, taken: Taken) -> str | None:
        """Tells what is new; returns why no further start is worth it, if so."""
        if taken.stored.count != self._stored:
            self._stored, self._in_vain = taken.stored.count, 0
        if taken.message is not None:
            self._see_message(taken.message)
        reasons = [self._see_happening(happening) for happening in taken.happenings]
        return next(filter(None, reasons), None)

    @property
    def step(self) -> int | None:
        """Updates done, as far as is known."""
        return self._message.step if self._message else None

    def _see_happening(self, happening: Happening) -> str | None:
        step = happening.step if happening.step is not None else self.step
        self.history.add(happening.kind, happening.text, step, **happening.facts)
        self._say(happening.kind, happening.text)
        match happening.kind:
            case "resized":
                self._expect_step()
            case "worker_lost":
                self._expect_step()
                return self._restarted(happening)
            case _:
                pass
        return None

    def _restarted(self, loss: Happening) -> str | None:
        if loss.facts.get("announced"):
            text = "from the newest checkpoint; a loss that was announced does not count"
        else:
            self._in_vain += 1
            if self._in_vain > self.max_restarts:
                return (
                    f"{loss.text} (the workers were started {self._in_vain} times without getting "
                    "to a new checkpoint; resources.max_restarts allows "
                    f"{self.max_restarts} more starts)"
                )
            text = (
                f"from the newest checkpoint, {self._in_vain} of {self.max_restarts} starts "
                "without a new one"
            )
        self.history.add("restarting", text, self.step, in_vain=self._in_vain)
        self._say("restarting", text)
        return None

    def _say(self, kind: Kind, text: str) -> None:
        self.say(f"{kind.replace('_', ' ')}: {text}")

    def _expect_step(self) -> None:
        if not self._awaits_step:
            self._awaits_step = True
            self._since = self.clock()
            self._reached = self.step or 0

    def _see_message(self, message: Message) -> None:
        if self._message is None or message.attempt != self._message.attempt:
            self._expect_step()
        self._message = message
        if message.record is not None:
            self._see_record(message.record)
        if self._awaits_step and message.step > message.start_step:
            self._awaits_step = False
            self._tell_first_step(message)

    def _tell_first_step(self, message: Message) -> None:
        seconds = round(self.clock() - self._since, 1)
        again = max(0, self._reached - message.start_step)
        text = f"step {message.start_step + 1} is done after {seconds:.0f} s"
        if again:
            text += f", {again} steps are made a second time"
        facts = {"seconds": seconds, "start_step": message.start_step, "steps_again": again}
        self.history.add("first_step", text, message.step, **facts)

    def _see_record(self, record: StepRecord) -> None:
        earlier, self._record = self._record, record
        bad = record.bad_steps - (earlier.bad_steps if earlier else 0)
        if bad > 0:
            text = f"{bad} updates were not finite and left out; see metrics.jsonl"
            self.history.add("bad_step", text, record.step, count=bad)
        failed = _failed(record) - (_failed(earlier) if earlier else 0)
        if failed > 0:
            text = f"{failed} uploads failed for good, the run goes on; see the log"
            self.history.add("upload_failed", text, record.step, count=int(failed))


def _failed(record: StepRecord) -> float:
    return record.counters.get("uploads_failed", 0)


@dataclass
class WitnessedDisplay:
    """A display whose news the witness sees too, for a run in this process."""

    display: Bar | PlainLines
    see: Callable[[Message], None]
    start_step: int
    total_steps: int

    def show(self, record: StepRecord) -> None:
        """The steps since the last record."""
        self.display.show(record)
        self._tell(record.step, record)

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        self.display.advance(step)
        self._tell(step)

    def note(self, text: str) -> None:
        """Something that happens once."""
        self.display.note(text)

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.display.__exit__(kind, error, trace)

    def _tell(self, step: int, record: StepRecord | None = None) -> None:
        self.see(Message("alone", self.start_step, self.total_steps, step, record))
