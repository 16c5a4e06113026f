"""The gradient of a training step, as the optimiser was given it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.training.small import CPU, KeptCheckpoints, surroundings
from training.job import B, Job, LoopSettings, Objective, plan_steps
from training.loop import train
from training.optimiser import OptimiserSettings, build_optimiser
from training.schedule import ScheduleSettings, schedule_in_steps
from training.snapshot import Position, TrainingState
from training.world import World

BETA = 0.9
"""Of AdamW: after one step its first moment is 1 - BETA times the gradient."""


def step_gradient(
    model: nn.Module, objective: Objective[B], batch: B, most: int | None
) -> dict[str, Tensor]:
    """What one update from a batch, computed `most` pictures at once, learns of each parameter."""
    settings = LoopSettings(steps=1, checkpoint_every_minutes=None)
    state = TrainingState(model, build_optimiser(model, None, OptimiserSettings()), None)
    plan = plan_steps(settings, 1)
    job = Job(
        state=state,
        model=model,
        objective=objective,
        batches=iter([batch]),
        plan=plan,
        schedule=schedule_in_steps(ScheduleSettings(), plan.total_steps, plan.steps_per_epoch),
        settings=settings,
        clip_norm=None,
        seed=3,
        world=World.alone(CPU),
        max_pictures_per_pass=most,
    )
    end = train(job, surroundings(KeptCheckpoints()), Position())
    assert end.bad_steps == 0
    assert end.pictures == len(batch.keys)
    moments = state.optimiser.state
    return {
        name: moments[parameter]["exp_avg"] / (1 - BETA)
        for name, parameter in model.named_parameters()
        if parameter in moments
    }


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    assert ours.keys() == theirs.keys()
    assert ours
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs])
    whole = torch.cat([tensor.flatten() for tensor in theirs.values()])
    assert float(whole.norm()) > 0
    return float(difference.double().norm() / whole.double().norm())
