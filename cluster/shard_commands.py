"""What `querypatch shards` does, with a bar for the person who waits."""

from collections.abc import Callable, Iterator, Sequence
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

from data.index import write_index
from data.indexing import index_shards
from data.shard_check import check_shards
from data.shards import ShardSettings, WriteProgress, write_shards
from data.source_items import Source, SourceKind
from data.sources import list_source
from data.splits import hold_out as split
from data.write_records import REPORT_NAME

_FAULTS_SHOWN = 50


def write_folder(
    source: str,
    destination: str,
    settings: ShardSettings,
    kind: SourceKind | None,
    pictures: str | None,
    ignore: Sequence[str],
    hold_out: int,
    console: Console,
) -> None:
    """Writes all pictures to `destination`, or to its `train` and `held_out` where some are held
    out; errors of `list_source` and `write_shards` pass through.
    """
    listed = list_source(source, kind, pictures, ignore)
    _say(console, f"{source}: {len(listed.items)} pictures, read as {listed.kind}")
    if not hold_out:
        _write(listed, destination, settings, console)
        return
    rest, held = split(listed, hold_out)
    _write(rest, f"{destination.rstrip('/')}/train", settings, console)
    # One broken picture is a large share of a few: it is left out and named all the same.
    lenient = settings.model_copy(
        update={"max_bad_share": max(settings.max_bad_share, min(0.5, 2 / hold_out))}
    )
    _write(held, f"{destination.rstrip('/')}/held_out", lenient, console)


def index_folder(url: str, console: Console) -> None:
    """Indexes the tars in the folder and puts the index beside them."""
    with _bar(console, "shards") as advance:
        index = index_shards(url, progress=advance)
    write_index(index)
    _say(console, f"{url}: {index.num_samples} samples in {len(index.shards)} shards indexed")


def check_folder(url: str, console: Console) -> bool:
    """Prints every fault of the shards; true where there is one."""
    with _bar(console, "shards") as advance:
        faults = check_shards(url, progress=advance)
    for fault in faults[:_FAULTS_SHOWN]:
        _say(console, str(fault))
    if len(faults) > _FAULTS_SHOWN:
        _say(console, f"... and {len(faults) - _FAULTS_SHOWN} more")
    _say(console, f"{url}: {len(faults)} faults" if faults else f"{url}: no fault")
    return bool(faults)


def _write(source: Source, destination: str, settings: ShardSettings, console: Console) -> None:
    with _bar(console, "pictures") as advance:

        def show(progress: WriteProgress) -> None:
            advance(progress.done, progress.total)

        report = write_shards(source, destination, settings, progress=show)
    _say(
        console,
        f"{destination}: {report.num_samples} pictures in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.1f} MB",
    )
    if report.left_out:
        first = report.left_out[0]
        _say(
            console,
            f"left out {len(report.left_out)}, named in {destination}/{REPORT_NAME}; the first: "
            f"{first.name}: {first.reason}",
        )


def _say(console: Console, text: str) -> None:
    """One line, whole: paths must stay copyable."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Units per second, once there are some."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f}/s")


@contextmanager
def _bar(console: Console, unit: str) -> Iterator[Callable[[int, int], None]]:
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
