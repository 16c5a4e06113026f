"""The record of a run: `metrics.jsonl`, one line per event, and TensorBoard curves in `events/`.

Only the first worker keeps it. Object stores cannot append, so there the record is kept locally
and published whole in the background, at checkpoints and about once a minute. A resumed run cuts
off what was recorded after its checkpoint: the record is one continuous story.
"""

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.appending import Curves, LineFile
from training.run_folder import RunFolder
from training.uploads import Uploads

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EVENTS = "events"


@dataclass(frozen=True)
class StepRecord:
    """What the steps since the last record did; means over steps and workers."""

    step: int
    """Updates done."""
    epoch: float
    """Passes over the data, with their fraction."""
    pictures: int
    """Pictures seen by all workers since the start of the run."""
    losses: Mapping[str, float]
    """`total` and every term, unweighted; steps that were not finite are left out."""
    rates: Mapping[str, float]
    """Learning rate of each parameter group at the last step."""
    grad_norm: float
    """Norm of all gradients before clipping."""
    pictures_per_s: float
    """Of all workers together."""
    wait_share: float
    """Share of the time that the first worker waited for data, 0..1."""
    memory_gib: float
    """Most memory that the first worker ever used: of its GPU, or resident on a CPU."""
    seconds_left: float
    """Until the last step, at the present speed."""
    skipped: int = 0
    """Pictures that could not be decoded, since the start of the run."""
    bad_steps: int = 0
    """Updates left out because they were not finite, since the start of the run."""
    skipped_keys: tuple[str, ...] = ()
    """The pictures that could not be decoded since the last record."""
    counters: Mapping[str, float | int] = field(default_factory=dict)
    """Counts of the data stream and the store, e.g. retries, of the first worker."""


@dataclass(frozen=True)
class BadStep:
    """An update that was left out because the loss or the gradient was not finite."""

    step: int
    """Number of the update, 1 first."""
    grad_norm: float
    losses: tuple[float, ...]
    """Loss of each worker."""
    keys: tuple[tuple[str, ...], ...]
    """Pictures of each worker."""


class Journal:
    """The open record of a run that continues after `start_step`."""

    def __init__(
        self,
        folder: RunFolder,
        uploads: Uploads,
        start_step: int,
        clock: Callable[[], float],
        publish_every_s: float = 60.0,
    ) -> None:
        self._folder = folder
        self._uploads = uploads
        self._clock = clock
        self._publish_every_s = publish_every_s
        self._published_at = clock()
        self._is_queued = False
        self._spool = None if folder.is_local else Path(tempfile.mkdtemp(prefix="querypatch-"))
        self._home = self._spool or Path(folder.root)
        self._home.mkdir(parents=True, exist_ok=True)
        lines = _continue_metrics(folder, self._home / METRICS, start_step)
        self.evaluated_steps = {_step(line) for line in lines if line.get("kind") == "evaluation"}
        """Steps whose evaluation is on record."""
        self._lines = LineFile(self._home / METRICS)
        self._curves = Curves(self._home / EVENTS, start_step + 1)

    def write_steps(self, record: StepRecord) -> None:
        """Records the steps since the last record."""
        numbers = _numbers(record)
        named = {"skipped_keys": list(record.skipped_keys)} if record.skipped_keys else {}
        head = {"kind": "train", "step": record.step, "epoch": round(record.epoch, 6)}
        self._write({**head, **numbers, **named})
        self._draw(numbers, record.step)

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records an evaluation after `step` updates."""
        self.evaluated_steps.add(step)
        self._write({"kind": "evaluation", "step": step, **metrics})
        self._draw(metrics, step)

    def write_bad_step(self, bad: BadStep) -> None:
        """Records which pictures an update that was not finite had seen."""
        content = {"grad_norm": bad.grad_norm, "losses": bad.losses, "keys": bad.keys}
        self._write({"kind": "bad_step", "step": bad.step, **content})

    def publish(self) -> None:
        """Brings a remote run's record up to date in the background; a local one always is."""
        self._published_at = self._clock()
        if self._spool is None:
            self._lines.sync()
            self._curves.flush()
            return
        if self._is_queued:
            return
        self._is_queued = True
        self._uploads.submit("the record of the run", self._publish_now)

    def close(self) -> None:
        """Publishes the end of the record and lets go of its files."""
        self._curves.close()
        self.publish()
        self._uploads.flush()
        self._lines.close()
        if self._spool:
            shutil.rmtree(self._spool)

    def _write(self, content: Mapping[str, object]) -> None:
        self._lines.add(json.dumps(_without_nan(content), allow_nan=False))
        if self._clock() - self._published_at >= self._publish_every_s:
            self.publish()

    def _draw(self, numbers: Mapping[str, float | int], step: int) -> None:
        for name, value in numbers.items():
            self._curves.add(name, value, step)

    def _publish_now(self) -> None:
        # From here on a new call queues again: its lines may come too late for the copy below.
        self._is_queued = False
        self._curves.flush()
        whole, _, _ = (self._home / METRICS).read_bytes().rpartition(b"\n")
        self._folder.write(METRICS, whole + b"\n" if whole else b"")
        for path in sorted((self._home / EVENTS).iterdir()):
            self._folder.write(f"{EVENTS}/{path.name}", path.read_bytes())


def read_metrics(folder: RunFolder) -> list[dict[str, object]]:
    """The record of a run so far, oldest line first; empty where there is none."""
    try:
        text = folder.read(METRICS).decode()
    except FileNotFoundError:
        return []
    return [line for line in map(_parsed, text.splitlines()) if line is not None]


def _continue_metrics(folder: RunFolder, target: Path, start_step: int) -> list[dict[str, object]]:
    """Leaves at `target` the lines up to `start_step`; none for a run that starts afresh."""
    kept = [line for line in read_metrics(folder) if _step(line) <= start_step and start_step > 0]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if folder.is_local:
        folder.write(METRICS, text.encode())
    else:
        target.write_text(text, encoding="utf-8")
    return kept


def _parsed(line: str) -> dict[str, object] | None:
    try:
        content = json.loads(line)
    except ValueError:
        logger.warning("%s: leaving out a line that was cut: %s", METRICS, line[:60])
        return None
    return content if isinstance(content, dict) else None


def _step(line: Mapping[str, object]) -> int:
    step = line.get("step")
    return step if isinstance(step, int) else 0


def _numbers(record: StepRecord) -> dict[str, float | int]:
    terms = {name: value for name, value in record.losses.items() if name != "total"}
    return {
        "loss": record.losses["total"],
        **{f"loss/{name}": value for name, value in terms.items()},
        **{f"lr/{name}": value for name, value in record.rates.items()},
        "grad_norm": record.grad_norm,
        "pictures": record.pictures,
        "pictures_per_s": round(record.pictures_per_s, 3),
        "wait_share": round(record.wait_share, 4),
        "memory_gib": round(record.memory_gib, 3),
        "skipped": record.skipped,
        "bad_steps": record.bad_steps,
        **record.counters,
    }


def _without_nan(value: object) -> object:
    """The value with numbers that JSON does not know written as words."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {key: _without_nan(item) for key, item in value.items()}
        case str():
            return value
        case Sequence():
            return [_without_nan(item) for item in value]
        case _:
            return value
