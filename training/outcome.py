"""How a run ended: `finished.json`, written when its last step is done or it stopped early.

It lies there only once the last checkpoint is stored, so that what comes after a run (finetuning,
an export, the next stage of a pipeline) can trust it. A run that was asked to stop has none: it is
not over.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from training.metrics import read_metrics
from training.moments import Now, utc_now
from training.run_folder import RunFolder

FINISHED = "finished.json"


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    step: int
    """Updates done."""
    at: str
    """UTC."""
    reason: Literal["done", "stopped_early"]
    """Its last step is done, or its evaluations no longer grew."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last evaluation, and the last `loss`."""


def read_outcome(folder: RunFolder) -> Outcome | None:
    """How the run ended; None while it is not over.

    Raises:
        StoreError: the store cannot be read.
        ValueError: the file is none of ours.
    """
    try:
        content = folder.read(FINISHED)
    except FileNotFoundError:
        return None
    try:
        return Outcome(**json.loads(content))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.url}/{FINISHED} is not one of ours ({error}); delete it, and "
            f"`querypatch resume {folder.url}` writes it anew"
        ) from error


def write_outcome(folder: RunFolder, step: int, total_steps: int, now: Now = utc_now) -> None:
    """Says that the run is over after `step` updates; an end that is on record stays as it is.

    Raises:
        StoreError: the store refused it.
    """
    earlier = read_outcome(folder)
    if earlier is not None and earlier.step == step:
        return
    reason: Literal["done", "stopped_early"] = "done" if step >= total_steps else "stopped_early"
    outcome = Outcome(step, now(), reason, _last_metrics(folder))
    folder.write(FINISHED, json.dumps(asdict(outcome), indent=1, allow_nan=False).encode())


def _last_metrics(folder: RunFolder) -> dict[str, float]:
    """Finite numbers only: JSON has no others."""
    found: dict[str, float] = {}
    for line in read_metrics(folder):
        if line.get("kind") == "evaluation":
            found |= _numbers({name: line[name] for name in line.keys() - {"step"}})
        elif line.get("kind") == "train":
            found |= _numbers({"loss": line.get("loss")})
    return found


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    return {
        name: value
        for name, value in sorted(values.items())
        if isinstance(value, int | float) and math.isfinite(value)
    }
