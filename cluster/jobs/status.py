"""How a run is, told by its folder alone: by whom, how far, how fast, since when, what happened.

Nothing of Ray is asked, so it is told for a run of any cluster, from any machine that can read the
folder, and after the cluster is gone.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from models.urls import public_url
from training.checkpoint import FOLDER, MANIFEST, newest_checkpoint
from training.control import stop_asked
from training.history import Event, read_history
from training.lease import LeaseState, read_lease
from training.metrics import read_metrics
from training.moments import seconds_between, utc_now
from training.outcome import read_outcome
from training.progress import duration
from training.record import read_recipe_values
from training.run_folder import RunFolder

State = Literal["finished", "running", "stopping", "silent", "stopped", "failed"]
"""Silent: its writer neither renews its lease nor let go of it; it was killed, or is cut off."""

SILENT_AFTER_S = 60
"""Seconds without a renewal of the lease after which a run counts as silent: twice its life."""

SHOWN_EVENTS = 8


class NoRun(ValueError):  # noqa: N818
    """A folder that holds no run."""


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder tells; None for what it does not."""

    run: str
    state: State
    stage: str
    step: int
    """Updates on record."""
    total_steps: int | None
    epoch: float | None
    loss: float | None
    pictures_per_s: float | None
    wait_share: float | None
    """Share of the time spent waiting for data, 0..1."""
    seconds_left: float | None
    """At the present speed, of a run that is going on."""
    skipped: int
    bad_steps: int
    checkpoint_step: int | None
    """Of the newest whole checkpoint."""
    checkpoint_age_s: float | None
    workers: int | None
    starts: int
    restarts: int
    """Times that workers were started again, in all starts."""
    writer: str | None
    """Job and host of who holds the run's lease, or held it last."""
    heard_s: float | None
    """Seconds since the lease was renewed."""
    stop_asked_by: str | None
    metrics: Mapping[str, float]
    """Of a finished run: its last ones."""
    events: Sequence[Event]
    """The newest ones."""


def read_status(folder: RunFolder, now: str | None = None) -> RunStatus:
    """The status of the run in `folder` at the moment `now` (UTC, ISO 8601).

    Raises NoRun, or StoreError where the folder cannot be read.
    """
    now = now or utc_now()
    values = read_recipe_values(folder)
    lease, events = read_lease(folder), read_history(folder)
    if values is None and lease is None and not events:
        raise NoRun(f"{public_url(folder.url)} holds no run: no recipe.yaml and no lease")
    record = _last_record(folder)
    outcome, asked = read_outcome(folder), stop_asked(folder)
    state = _state(outcome is not None, lease, asked is not None, events)
    step = outcome.step if outcome else _integer(record.get("step")) or 0
    total = _total_steps(values or {}, record)
    checkpoint = newest_checkpoint(folder)
    speed = _number(record.get("pictures_per_s"))
    return RunStatus(
        run=public_url(folder.url),
        state=state,
        stage=str((values or {}).get("stage", "pretrain")),
        step=step,
        total_steps=total,
        epoch=_number(record.get("epoch")),
        loss=_number(record.get("loss")),
        pictures_per_s=speed,
        wait_share=_number(record.get("wait_share")),
        seconds_left=_seconds_left(values or {}, step, total, speed) if _goes_on(state) else None,
        skipped=_integer(record.get("skipped")) or 0,
        bad_steps=_integer(record.get("bad_steps")) or 0,
        checkpoint_step=checkpoint.step if checkpoint else None,
        checkpoint_age_s=_age_s(folder, checkpoint.name, now) if checkpoint else None,
        workers=_workers(events),
        starts=_count(events, "started"),
        restarts=_count(events, "restarting"),
        writer=f"job {lease.holder.job} on {lease.holder.host}" if lease else None,
        heard_s=lease.age_s if lease else None,
        stop_asked_by=asked.by if asked and _goes_on(state) else None,
        metrics=outcome.metrics if outcome else {},
        events=events[-SHOWN_EVENTS:],
    )


def status_json(status: RunStatus) -> str:
    """For programs; moments as the events have them, times in seconds."""
    return json.dumps(asdict(status), indent=1, default=str)


def status_text(status: RunStatus) -> str:
    """A few lines for a person."""
    lines = [f"{status.run}: {status.state} ({status.stage})"]
    lines += [f"  {name:<11} {text}" for name, text in _parts(status) if text]
    if status.events:
        lines.append("  what happened last, in UTC:")
        lines += [
            f"    {event.at[:19].replace('T', ' ')}  {_told(event)}" for event in status.events
        ]
    return "\n".join(lines)


def _told(event: Event) -> str:
    return f"{event.kind.replace('_', ' ')}: {event.text}"


def _parts(status: RunStatus) -> list[tuple[str, str]]:
    of = f" of {status.total_steps}" if status.total_steps else ""
    epoch = f", epoch {status.epoch:.2f}" if status.epoch is not None else ""
    left = f", {duration(status.seconds_left)} left" if status.seconds_left is not None else ""
    speed = ""
    if status.pictures_per_s is not None:
        waiting = status.wait_share or 0
        speed = f"{status.pictures_per_s:.1f} pictures/s, {waiting:.0%} of the time without data"
    return [
        ("step", f"{status.step}{of}{epoch}{left}"),
        ("speed", speed if _goes_on(status.state) else ""),
        ("loss", f"{status.loss:.4g}" if status.loss is not None else ""),
        ("result", ", ".join(f"{key} {value:.4g}" for key, value in _judged(status.metrics))),
        ("checkpoint", _checkpoint(status)),
        ("workers", _workers_text(status)),
        ("left out", _left_out(status)),
        ("writer", _writer(status)),
        ("stop", f"asked by {status.stop_asked_by}" if status.stop_asked_by else ""),
    ]


def _checkpoint(status: RunStatus) -> str:
    if status.checkpoint_step is None:
        return "none yet"
    age = status.checkpoint_age_s
    return f"step {status.checkpoint_step}" + (f", {duration(age)} old" if age is not None else "")


def _workers_text(status: RunStatus) -> str:
    count = str(status.workers) if status.workers is not None else "-"
    return f"{count}, {status.starts} starts, {status.restarts} restarts"


def _left_out(status: RunStatus) -> str:
    if not (status.skipped or status.bad_steps):
        return ""
    return f"{status.skipped} broken pictures, {status.bad_steps} updates that were not finite"


def _writer(status: RunStatus) -> str:
    if status.writer is None or not _goes_on(status.state) or status.heard_s is None:
        return ""
    return f"{status.writer}, heard of {duration(status.heard_s)} ago"


def _judged(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """The few numbers that a person asks for first."""
    names = [
        name for name in ("eval/ap", "eval/ap50", "eval/pq", "eval/top1", "loss") if name in metrics
    ]
    return [(name, metrics[name]) for name in names]


def _state(
    is_finished: bool, lease: LeaseState | None, is_asked: bool, events: Sequence[Event]
) -> State:
    is_held = lease is not None and not lease.is_released
    if is_held and lease is not None and lease.age_s <= SILENT_AFTER_S:
        return "stopping" if is_asked else "running"
    if is_finished:
        return "finished"
    if is_held:
        return "silent"
    return "failed" if events and events[-1].kind == "failed" else "stopped"


def _goes_on(state: State) -> bool:
    return state in ("running", "stopping", "silent")


def _last_record(folder: RunFolder) -> Mapping[str, object]:
    records = [line for line in read_metrics(folder) if line.get("kind") == "train"]
    return records[-1] if records else {}


def _total_steps(values: Mapping[str, object], record: Mapping[str, object]) -> int | None:
    """As the recipe says it; a length in epochs by how many the steps so far were."""
    loop = values.get("loop")
    told = loop if isinstance(loop, Mapping) else {}
    steps, epochs = _integer(told.get("steps")), _number(told.get("epochs"))
    step, epoch = _integer(record.get("step")), _number(record.get("epoch"))
    if steps is not None or epochs is None:
        return steps
    return math.ceil(epochs * step / epoch - 1e-6) if step and epoch else None


def _seconds_left(
    values: Mapping[str, object], step: int, total: int | None, pictures_per_s: float | None
) -> float | None:
    batch, loop = _integer(values.get("global_batch")), values.get("loop")
    accumulate = _integer(loop.get("accumulate")) if isinstance(loop, Mapping) else 1
    if total is None or batch is None or not pictures_per_s:
        return None
    return max(0, total - step) * batch * (accumulate or 1) / pictures_per_s


def _age_s(folder: RunFolder, checkpoint: str, now: str) -> float | None:
    try:
        written = folder.filesystem.modified(folder.path(f"{FOLDER}/{checkpoint}/{MANIFEST}"))
    except (NotImplementedError, OSError):
        return None
    if not isinstance(written, datetime):
        return None
    return max(0.0, seconds_between(written.astimezone(UTC).isoformat(), now))


def _workers(events: Sequence[Event]) -> int | None:
    for event in reversed(events):
        if event.kind in ("workers", "resized"):
            return _integer(event.facts.get("workers", event.facts.get("count")))
    return None


def _count(events: Sequence[Event], kind: str) -> int:
    return sum(event.kind == kind for event in events)


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
