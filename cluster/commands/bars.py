"""What a person sees of a command: a line, or a bar with rate and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def say(console: Console, text: str) -> None:
    """One line, whole: paths must stay copyable."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Units per second, once there are some."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f}/s")


@contextmanager
def open_bar(console: Console, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left; gives the function that moves it to (done, total)."""
    columns = (
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(unit, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
