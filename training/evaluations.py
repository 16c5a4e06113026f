"""Evaluations during a run: when they are due, and scoring that need not hold up the training.

An evaluation has two parts. Predicting needs the model, so all workers do it together between two
steps. Scoring needs numbers alone: the first worker does it, at once or in a thread while training
goes on (`loop.score_in_background`). Its result is waited for before the next evaluation and at the
end, and recorded under the step whose weights were judged. One that a kill has lost is made again
by the resumed run, where its checkpoint is of that very step.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from training.job import B, Evaluated, Job, Scoring, Surroundings
from training.world import broadcast_object


@dataclass(frozen=True)
class _Pending:
    """An evaluation whose scoring is under way."""

    step: int
    weights: Mapping[str, Tensor]
    metrics: "Future[Mapping[str, float | int]]"


class Evaluations(Generic[B]):
    """The evaluations of one start of a run; every method is called on every worker."""

    def __init__(self, job: Job[B], surroundings: Surroundings) -> None:
        self.asks_to_end = False
        """True on the first worker once its judge has seen enough."""
        self._job = job
        self._around = surroundings
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._pending: _Pending | None = None

    def begin(self, step: int) -> None:
        """Before the first step: judges the untrained model, so that curves have a start, and what
        an earlier start of the run could not finish.
        """
        journal = self._around.journal
        is_due = self.is_due(step, is_last=step >= self._job.plan.total_steps)
        is_missing = is_due and (journal is None or step not in journal.evaluated_steps)
        if broadcast_object(is_missing, self._job.world):
            self.evaluate(step)
            self.settle(step, wait=True)

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether the model is to be judged after `step` updates."""
        every = self._job.plan.evaluate_every
        has_way = self._around.evaluate is not None
        return has_way and every is not None and (is_last or step % every == 0)

    def evaluate(self, step: int) -> None:
        """Predicts with the model as it is, the moving average where there is one."""
        self.settle(step, wait=True)
        if self._around.evaluate is None:
            return
        state = self._job.state
        model = state.ema.model if state.ema else state.model
        model.eval()
        with torch.no_grad():
            scoring = self._around.evaluate(model, lambda: self._around.beat(step))
        self._around.beat(step)
        self._job.model.train()
        if not self._job.world.is_first:
            return
        weights = _at_rest(model.state_dict()) if self._around.judge else {}
        self._pending = _Pending(step, weights, self._scored(scoring))

    def settle(self, step: int, *, wait: bool) -> dict[str, float]:
        """Records what has been scored; with `wait` everything. Metrics that are of this `step`."""
        pending = self._pending
        if pending is None or not (wait or pending.metrics.done()):
            return {}
        self._pending = None
        metrics = {f"eval/{name}": float(value) for name, value in pending.metrics.result().items()}
        self._tell(pending.step, metrics)
        if self._around.judge:
            evaluated = Evaluated(pending.step, metrics, pending.weights)
            self.asks_to_end = self._around.judge(evaluated) or self.asks_to_end
        return metrics if pending.step == step else {}

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def _scored(self, scoring: Scoring) -> "Future[Mapping[str, float | int]]":
        if self._job.settings.score_in_background:
            return self._thread.submit(scoring)
        return _done(scoring)

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._around.journal:
            self._around.journal.write_evaluation(step, metrics)
        if self._around.display:
            numbers = ", ".join(
                f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items()
            )
            self._around.display.note(f"evaluation at step {step}: {numbers}")


def _done(scoring: Callable[[], Mapping[str, float | int]]) -> "Future[Mapping[str, float | int]]":
    future: Future[Mapping[str, float | int]] = Future()
    future.set_result(scoring())
    return future


def _at_rest(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
