"""What stays of evaluations: the best weights, every table, and when to stop early.

The best weights lie in `best/model.safetensors`, one file with its step and metrics in the header,
so that it is whole or not there. They are those of the evaluation, the moving average where there
is one. The evaluation before the first update is never the best; of weights that a store did not
take the next best ones take the place.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence

from safetensors.torch import save_file
from torch import Tensor

from finetune.task import Judgement
from training.early_stop import EarlyStopSettings, best_step, stopped_at
from training.job import Evaluated
from training.metrics import read_metrics
from training.run_folder import RunFolder
from training.snapshot import MODEL
from training.uploads import Uploads

logger = logging.getLogger(__name__)

BEST = "best"
EVALUATIONS = "evaluations"

History = Sequence[tuple[int, float]]
"""(updates done, metric) of each evaluation, in order."""

Metadata = Callable[[Evaluated], Mapping[str, str]]
"""The header of weights that were judged."""


class Keeper:
    """Keeps what is worth keeping of a run's evaluations; of the first worker alone."""

    def __init__(
        self,
        folder: RunFolder,
        uploads: Uploads,
        best_metric: str,
        early_stop: EarlyStopSettings | None,
        metadata: Metadata,
    ) -> None:
        self._folder = folder
        self._uploads = uploads
        self._best_metric = best_metric
        self._early_stop = early_stop
        self._metadata = metadata
        self._best = history_of(folder, best_metric)
        self._watched = history_of(folder, early_stop.metric) if early_stop else []
        self._told = Judgement({})
        self._lost = set[int]()
        """Steps whose weights should have been kept and could not be stored."""

    def hear(self, judgement: Judgement) -> Mapping[str, float]:
        """Takes the newest judgement, which `judge` is called with next; its metrics."""
        self._told = judgement
        return judgement.metrics

    def judge(self, evaluated: Evaluated) -> bool:
        """Stores the table, and the weights where they are the best so far.

        True where the run should end: early stopping has lost its patience.
        """
        content = {"step": evaluated.step, **self._told.content}
        self._uploads.submit(
            f"the evaluation of step {evaluated.step}",
            lambda: self._store_table(evaluated.step, content),
        )
        self._best = _continued(self._best, evaluated, self._best_metric)
        there = [entry for entry in self._best if entry[0] not in self._lost]
        if best_step(there) == evaluated.step:
            self._uploads.submit("the best weights", lambda: self._store_best(evaluated))
        if self._early_stop is None:
            return False
        self._watched = _continued(self._watched, evaluated, self._early_stop.metric)
        stop = stopped_at(self._watched, self._early_stop)
        if stop is not None:
            logger.info(
                "early stop: %s has not grown in the last %d evaluations",
                self._early_stop.metric,
                self._early_stop.patience,
            )
        return stop is not None

    def _store_table(self, step: int, content: Mapping[str, object]) -> None:
        text = json.dumps(content, indent=1)
        self._folder.write(f"{EVALUATIONS}/step_{step:06d}.json", text.encode())

    def _store_best(self, evaluated: Evaluated) -> None:
        weights: dict[str, Tensor] = dict(evaluated.weights)
        try:
            with self._folder.spool() as spool:
                header = {**self._metadata(evaluated), "format": "pt"}
                save_file(weights, spool / MODEL, metadata=header)
                self._folder.put(spool / MODEL, f"{BEST}/{MODEL}")
        except OSError:
            self._lost.add(evaluated.step)
            raise


def history_of(folder: RunFolder, metric: str) -> list[tuple[int, float]]:
    """A metric in all evaluations that a run has on record; those without it are left out."""
    return [
        (step, float(value))
        for line in read_metrics(folder)
        if line.get("kind") == "evaluation"
        and isinstance(step := line.get("step"), int)
        and isinstance(value := line.get(metric), float | int)
    ]


def _continued(history: History, evaluated: Evaluated, metric: str) -> list[tuple[int, float]]:
    """A resumed run repeats the steps since its checkpoint: what they told before is forgotten."""
    before = [entry for entry in history if entry[0] < evaluated.step]
    found = evaluated.metrics.get(metric)
    if found is None:
        if evaluated.step:
            logger.warning("the evaluation of step %d has no %s", evaluated.step, metric)
        return before
    return [*before, (evaluated.step, found)]
