"""What `querypatch shards` does, with a bar for the person who waits."""

from collections.abc import Sequence

from rich.console import Console

from cluster.commands.bars import open_bar, say
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
    say(console, f"{source}: {len(listed.items)} pictures, read as {listed.kind}")
    if listed.faults:
        count, first = len(listed.faults), listed.faults[0]
        say(console, f"{count} faults of annotations (`querypatch data check`), e.g. {first}")
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
    with open_bar(console, "shards") as advance:
        index = index_shards(url, progress=advance)
    write_index(index)
    say(console, f"{url}: {index.num_samples} samples in {len(index.shards)} shards indexed")


def check_folder(url: str, console: Console) -> bool:
    """Prints every fault of the shards; true where there is one."""
    with open_bar(console, "shards") as advance:
        faults = check_shards(url, progress=advance)
    for fault in faults[:_FAULTS_SHOWN]:
        say(console, str(fault))
    if len(faults) > _FAULTS_SHOWN:
        say(console, f"... and {len(faults) - _FAULTS_SHOWN} more")
    say(console, f"{url}: {len(faults)} faults" if faults else f"{url}: no fault")
    return bool(faults)


def _write(source: Source, destination: str, settings: ShardSettings, console: Console) -> None:
    with open_bar(console, "pictures") as advance:

        def show(progress: WriteProgress) -> None:
            advance(progress.done, progress.total)

        report = write_shards(source, destination, settings, progress=show)
    say(
        console,
        f"{destination}: {report.num_samples} pictures in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.1f} MB",
    )
    if report.left_out:
        first = report.left_out[0]
        say(
            console,
            f"left out {len(report.left_out)}, named in {destination}/{REPORT_NAME}; the first: "
            f"{first.name}: {first.reason}",
        )
