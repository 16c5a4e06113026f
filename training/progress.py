"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from training.metrics import StepRecord


@runtime_checkable
class Display(Protocol):
    """Shows a run to a person."""

    def show(self, record: StepRecord) -> None:
        """The steps since the last record."""
        ...

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        ...

    def note(self, text: str) -> None:
        """Something that happens once, e.g. an evaluation."""
        ...


class Bar:
    """A bar with the record beside it; use it in a `with` block."""

    def __init__(self, console: Console, start_step: int, total_steps: int) -> None:
        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
        )
        self._console = console
        self._progress = Progress(*columns, console=console, expand=True, transient=False)
        self._task: TaskID = self._progress.add_task(
            "first step ...", total=total_steps, completed=start_step
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, record: StepRecord) -> None:
        """The record in one line beside the bar."""
        self._progress.update(self._task, description=_summary(record))

    def advance(self, step: int) -> None:
        """Moves the bar; cheap enough for every step, drawing is bounded by rich."""
        self._progress.update(self._task, completed=step)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False)


class PlainLines:
    """One line per record; use it in a `with` block."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def show(self, record: StepRecord) -> None:
        """The record in one line."""
        self.note(f"step {record.step}/{self._total_steps}  {_summary(record)}")

    def advance(self, step: int) -> None:
        """Nothing: a line per step would drown the log."""

    def note(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def open_display(console: Console, start_step: int, total_steps: int) -> Bar | PlainLines:
    """A bar where `console` is a terminal, else plain lines."""
    if console.is_terminal:
        return Bar(console, start_step, total_steps)
    return PlainLines(console, total_steps)


def _summary(record: StepRecord) -> str:
    parts = [
        f"epoch {record.epoch:.2f}",
        f"loss {record.losses['total']:.4g}",
        f"lr {max(record.rates.values()):.3g}",
        f"{record.pictures_per_s:.1f} pictures/s",
        f"waiting {record.wait_share:.0%}",
        f"{record.memory_gib:.1f} GiB",
        f"left {duration(record.seconds_left)}",
    ]
    parts += [f"skipped {record.skipped}"] if record.skipped else []
    parts += [f"bad steps {record.bad_steps}"] if record.bad_steps else []
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """E.g. 2d 03:04:05, or 00:00:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}d {clock}" if days else clock
