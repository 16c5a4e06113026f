"""The loop: batch, losses, gradients, update; the same for pretraining and finetuning.

One device read per step: whether the update is finite, whether to stop and whether to checkpoint
are agreed between the workers in one small sum, read before the update is made.

A worker computes its part of a batch in one pass or more. What losses are divided by is counted
over all workers before, so that the gradients of all parts add up to those of the whole batch, and
what the objective draws hangs on the batch alone. Dropout is seeded at every step from (seed, step,
rank): a resumed run draws what the uninterrupted one would have drawn, with no random state stored,
whatever an evaluation in between has drawn; another number of workers draws other numbers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from models.shares import Share
from models.structures import Losses
from training.job import B, Batch, Job, Plan, Surroundings
from training.metrics import BadStep
from training.optimiser import (
    clip_gradients,
    gradient_norm,
    set_learning_rates,
    trainable_parameters,
)
from training.parallel import averaging, is_averaged
from training.reporting import Reporter, Verdict
from training.snapshot import Position, TrainingState
from training.world import all_reduce_max, all_reduce_sum, broadcast_object, gather_objects


class NonFiniteLoss(ArithmeticError):  # noqa: N818
    """Too many updates in a row had a loss or a gradient that was not finite."""


def train(job: Job[B], surroundings: Surroundings, start: Position) -> Position:
    """Trains from `start` to the end of the plan, or until asked to stop; returns where it is.

    Stopping, like the end, leaves a checkpoint behind that is stored when this returns.

    Raises:
        NonFiniteLoss: `max_bad_steps` updates in a row were not finite; names step and pictures.
        ValueError: the stream of batches ended.
    """
    position = start
    optimiser = job.state.optimiser
    parameters = trainable_parameters(optimiser)
    reporter = Reporter(job, surroundings)
    reporter.begin(position)
    job.model.train()
    is_over = broadcast_object(reporter.asks_to_end, job.world)
    while position.step < job.plan.total_steps and not is_over:
        rates = set_learning_rates(optimiser, job.schedule, position.step)
        batches = _padded_alike(job, reporter.wait_for_batches())
        if position.step == start.step and is_averaged(job.model):
            _settle_buckets(job, batches, position.step)
        # After the batches: loader processes that start draw from the global state too.
        seed_dropout(job.seed, position.step, job.world.rank)
        losses = _differentiate(job, batches, position.step)
        norm = gradient_norm(parameters)
        asked = surroundings.stop() or reporter.asks_to_end
        wishes = (asked, reporter.wants_checkpoint(position))
        verdict = _agree(losses, norm, batches, wishes)
        if verdict.is_good:
            clip_gradients(parameters, norm, job.clip_norm)
            _update(job.state, position.step)
            reporter.add_losses(losses, norm)
        optimiser.zero_grad(set_to_none=True)
        position = _advanced(position, verdict, job.plan)
        if not verdict.is_good:
            bad = _bad_step(position, losses, norm, batches)
            reporter.tell_bad_step(bad)
            _give_up_after(job.settings.max_bad_steps, position, bad)
        reporter.tell(position, verdict, rates, batches)
        if verdict.stop:
            break
    reporter.end(position)
    surroundings.checkpoints.flush()
    return position


def _padded_alike(job: Job[B], batches: Sequence[B]) -> Sequence[B]:
    """Where `pad_to` asks for it: every worker's part of a batch padded to one size."""
    if job.settings.pad_to == "part" or job.world.size == 1:
        return batches
    extents = all_reduce_max([side for batch in batches for side in batch.extent], job.world)
    pairs = zip(batches, extents[::2], extents[1::2], strict=True)
    return [batch.padded(height, width) for batch, height, width in pairs]


def _settle_buckets(job: Job[B], batches: Sequence[B], step: int) -> None:
    """One pass for nothing: DDP arranges its buckets by the order of its first gradients.

    Buckets decide in which order the gradients of three or more workers are added. Without this a
    resumed run's first update would differ from the uninterrupted run's in its last bits (seen).
    """
    _differentiate(job, batches, step)
    job.state.optimiser.zero_grad(set_to_none=True)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seeds the global state, the only one that dropout knows, by (seed, step, rank) alone."""
    torch.manual_seed(_derived(seed, step, rank, "dropout"))


def batch_generator(seed: int, batch: int) -> torch.Generator:
    """What is drawn for a whole batch depends on the seed and its number over all epochs alone."""
    return torch.Generator().manual_seed(_derived(seed, batch, "objective"))


def _derived(*words: int | str) -> int:
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _differentiate(job: Job[B], batches: Sequence[B], step: int) -> Losses:
    """Leaves the mean gradient of the batches in the parameters; returns their mean losses."""
    counts = all_reduce_sum(torch.stack([job.objective.counts(batch) for batch in batches]))
    parts = [_parts(batch, job.max_pictures_per_pass) for batch in batches]
    left = sum(len(of_batch) for of_batch in parts)
    found: list[Losses] = []
    for number, (batch, of_batch) in enumerate(zip(batches, parts, strict=True)):
        share = Share(counts[number], job.world.size)
        for rows in of_batch:
            left -= 1
            part = batch if len(of_batch) == 1 else batch.part(rows)
            generator = batch_generator(job.seed, step * len(batches) + number)
            with averaging(job.model, is_last=left == 0):
                with _precision(job):
                    losses = job.objective(job.model, part, share, generator)
                torch.autograd.backward(losses.total / len(batches))
            found.append(_detached(losses))
    return found[0] if len(found) == 1 else _added(found, len(batches))


def _parts(batch: Batch, most: int | None) -> list[slice]:
    """Rows of each pass over a batch, as evenly as can be, `most` of them in one."""
    count = len(batch.keys)
    passes = max(1, -(-count // most)) if most else 1
    bounds = [count * number // passes for number in range(passes + 1)]
    return [slice(first, end) for first, end in pairwise(bounds)]


def _precision(job: Job[B]) -> torch.autocast:
    is_mixed = job.settings.precision == "bf16"
    return torch.autocast(job.world.device.type, dtype=torch.bfloat16, enabled=is_mixed)


def _detached(losses: Losses) -> Losses:
    terms = {name: term.detach() for name, term in losses.terms.items()}
    return Losses(losses.total.detach(), terms)


def _added(found: Sequence[Losses], num_batches: int) -> Losses:
    """The sum over the parts of each batch, the mean over the batches."""
    terms = {
        name: torch.stack([losses.terms[name] for losses in found]).sum() / num_batches
        for name in found[0].terms
    }
    return Losses(torch.stack([losses.total for losses in found]).sum() / num_batches, terms)


def _agree(
    losses: Losses, norm: Tensor, batches: Sequence[B], wishes: tuple[bool, bool]
) -> Verdict:
    """The same verdict on every worker, by one sum and one device read."""
    is_bad = ~(torch.isfinite(losses.total) & torch.isfinite(norm))
    pictures = sum(len(batch.keys) for batch in batches)
    skipped = sum(len(batch.skipped) for batch in batches)
    told = torch.tensor([*wishes, pictures, skipped], dtype=torch.float32, device=norm.device)
    bad, stop, checkpoint, pictures_sum, skipped_sum = all_reduce_sum(
        torch.cat([is_bad.float()[None], told])
    ).tolist()
    return Verdict(
        is_good=bad == 0,
        stop=stop > 0,
        checkpoint=checkpoint > 0,
        pictures=int(pictures_sum),
        skipped=int(skipped_sum),
    )


def _update(state: TrainingState, step: int) -> None:
    state.optimiser.step()
    if state.ema:
        state.ema.update(step)


def _advanced(position: Position, verdict: Verdict, plan: Plan) -> Position:
    step = position.step + 1
    epoch, batch = divmod(step * plan.accumulate, plan.batches_per_epoch)
    bad = not verdict.is_good
    return replace(
        position,
        step=step,
        epoch=epoch,
        batch=batch,
        pictures=position.pictures + verdict.pictures,
        skipped=position.skipped + verdict.skipped,
        bad_steps=position.bad_steps + bad,
        bad_in_a_row=position.bad_in_a_row + 1 if bad else 0,
    )


def _bad_step(position: Position, losses: Losses, norm: Tensor, batches: Sequence[B]) -> BadStep:
    keys = tuple(key for batch in batches for key in batch.keys)
    told = gather_objects((float(losses.total), keys))
    return BadStep(
        step=position.step,
        grad_norm=float(norm),
        losses=tuple(loss for loss, _ in told),
        keys=tuple(keys for _, keys in told),
    )


def _give_up_after(max_bad_steps: int, position: Position, bad: BadStep) -> None:
    if position.bad_in_a_row < max_bad_steps:
        return
    told = list(zip(bad.keys, bad.losses, strict=True))
    guilty = [(keys, loss) for keys, loss in told if not math.isfinite(loss)] or told
    keys = [key for part, _ in guilty for key in part]
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    raise NonFiniteLoss(
        f"step {bad.step}: {position.bad_in_a_row} updates in a row were not finite, loss "
        f"{guilty[0][1]}, gradient norm {bad.grad_norm}, pictures "
        f"{', '.join(keys[:8])}{more}; the last checkpoint is good: start a new run "
        "from it with init=RUN and a lower optimiser.lr, or loop.precision=float32"
    )
