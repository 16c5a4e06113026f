"""What the loop tells while it runs: records, evaluations, checkpoints, and when each is due."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from jaxtyping import Float
from torch import Tensor

from models.structures import Losses
from training.evaluations import Evaluations
from training.job import B, Job, Surroundings
from training.memory import return_free_memory
from training.metrics import BadStep, StepRecord
from training.snapshot import Position
from training.window import Window, memory_gib
from training.world import gather_objects

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What all workers agree on about one step."""

    is_good: bool
    """Loss and gradient are finite on every worker."""
    stop: bool
    checkpoint: bool
    pictures: int
    """Of all workers."""
    skipped: int
    """Pictures of all workers that could not be decoded."""


class Reporter(Generic[B]):
    """Keeps the window of steps since the last record; every method is called on every worker."""

    def __init__(self, job: Job[B], surroundings: Surroundings) -> None:
        self._job = job
        self._around = surroundings
        self._window = Window(surroundings.clock)
        self._evaluations = Evaluations(job, surroundings)
        self._saved_at = surroundings.clock()

    def begin(self, position: Position) -> None:
        """Evaluates where an evaluation of this position is due and missing."""
        if position.step >= self._job.plan.total_steps:
            logger.info("the run is already at its last step, %d", position.step)
        self._evaluations.begin(position.step)
        self._window = Window(self._around.clock)

    @property
    def asks_to_end(self) -> bool:
        """Whether the evaluations so far are reason to end the run; of the first worker."""
        return self._evaluations.asks_to_end

    def end(self, position: Position) -> None:
        """Waits for what is still being scored."""
        self._evaluations.settle(position.step, wait=True)
        self._evaluations.close()

    def wait_for_batches(self) -> tuple[B, ...]:
        """The batches of one update; the time is counted as waiting for data."""
        began = self._around.clock()
        batches = tuple(self._next_batch() for _ in range(self._job.plan.accumulate))
        self._window.waited_s += self._around.clock() - began
        return batches

    def wants_checkpoint(self, position: Position) -> bool:
        """Whether one is due or wanted after this step; only the first worker's clock has a say."""
        settings = self._job.settings
        every_steps, every_minutes = (
            settings.checkpoint_every_steps,
            settings.checkpoint_every_minutes,
        )
        by_steps = every_steps is not None and (position.step + 1) % every_steps == 0
        waited_s = self._around.clock() - self._saved_at
        by_clock = every_minutes is not None and waited_s >= 60 * every_minutes
        wanted = self._around.checkpoint_wanted()
        return by_steps or wanted or (by_clock and self._job.world.is_first)

    def add_losses(self, losses: Losses, grad_norm: Float[Tensor, ""]) -> None:
        """Keeps the numbers of a good step, on their device."""
        self._window.add_losses(losses, grad_norm)

    def tell_bad_step(self, bad: BadStep) -> None:
        """Records a step that was left out."""
        if self._around.journal:
            self._around.journal.write_bad_step(bad)
        if self._job.world.is_first:
            logger.warning(
                "step %d left out: loss %s, gradient norm %s", bad.step, bad.losses, bad.grad_norm
            )

    def tell(
        self,
        position: Position,
        verdict: Verdict,
        rates: Mapping[str, float],
        batches: Sequence[B],
    ) -> None:
        """Records, evaluates and saves what is due after a step, in this order."""
        self._around.beat(position.step)
        self._window.steps += 1
        self._window.pictures += verdict.pictures
        self._window.skipped += verdict.skipped
        self._window.skipped_keys += [key for batch in batches for key in batch.skipped]
        is_last = position.step >= self._job.plan.total_steps
        is_saved = is_last or verdict.stop or verdict.checkpoint
        # Who asks to stop may grant seconds only: no evaluation then, but a checkpoint.
        is_evaluated = self._evaluations.is_due(position.step, is_last) and (
            is_last or not verdict.stop
        )
        if self._around.display:
            self._around.display.advance(position.step)
        if is_saved or is_evaluated or position.step % self._job.settings.log_every == 0:
            self._record(position, rates)
            if is_evaluated:
                self._evaluations.evaluate(position.step)
            metrics = self._settled(position)
            if is_saved:
                self._save(position, metrics)
            self._window = Window(self._around.clock)

    def _settled(self, position: Position) -> dict[str, float]:
        in_background = self._job.settings.score_in_background
        return self._evaluations.settle(position.step, wait=not in_background)

    def _next_batch(self) -> B:
        batch = next(self._job.batches, None)
        if batch is None:
            raise ValueError("the stream of batches ended; it must go on from epoch to epoch")
        return batch

    def _record(self, position: Position, rates: Mapping[str, float]) -> None:
        return_free_memory()
        record = self._step_record(position, rates)
        if self._around.journal:
            self._around.journal.write_steps(record)
        if self._around.display:
            self._around.display.show(record)
        if self._around.report:
            self._around.report(record)

    def _step_record(self, position: Position, rates: Mapping[str, float]) -> StepRecord:
        window, plan = self._window, self._job.plan
        means = window.means(self._job.world)
        seconds = max(self._around.clock() - window.began, 1e-9)
        steps_left = plan.total_steps - position.step
        counters = self._around.counters() if self._around.counters else {}
        return StepRecord(
            step=position.step,
            epoch=position.step / plan.steps_per_epoch,
            pictures=position.pictures,
            losses=means.losses,
            rates=rates,
            grad_norm=means.grad_norm,
            pictures_per_s=window.pictures / seconds,
            wait_share=window.waited_s / seconds,
            memory_gib=memory_gib(self._job.world.device),
            seconds_left=steps_left * seconds / window.steps,
            skipped=position.skipped,
            bad_steps=position.bad_steps,
            skipped_keys=_gathered(window),
            counters=counters,
        )

    def _save(self, position: Position, metrics: Mapping[str, float]) -> None:
        # The record goes first: a checkpoint never knows of steps that its record does not.
        if self._around.journal:
            self._around.journal.publish()
        self._around.checkpoints.save(self._job.state, position, metrics)
        self._saved_at = self._around.clock()


def _gathered(window: Window) -> tuple[str, ...]:
    """Keys of all workers; `window.skipped` is the same everywhere, so all ask or none."""
    if not window.skipped:
        return ()
    return tuple(key for keys in gather_objects(tuple(window.skipped_keys)) for key in keys)
