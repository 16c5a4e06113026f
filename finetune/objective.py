"""The detection objective: every object to one query, every other query to none (DETR, 3.1)."""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from models.losses import LossWeights, set_losses, unmatched_losses
from models.matching import MatchingCosts, UnmatchableError
from models.structures import DetectionBatch, DetectorOutput, GroupOutput, Losses
from training.world import World, all_reduce_sum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionObjective:
    """The losses of a batch; a value, so that the loop can call it with any model."""

    costs: MatchingCosts
    weights: LossWeights
    world: World

    def __call__(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        generator: torch.Generator,  # noqa: ARG002  (nothing is drawn)
    ) -> Losses:
        """The losses of one step; predictions that are not finite give a total of NaN."""
        output: DetectorOutput = model(batch.images)
        (group,) = output.groups
        return group_losses(group, batch, self.costs, self.weights, self.world)


def group_losses(
    group: GroupOutput,
    batch: DetectionBatch,
    costs: MatchingCosts,
    weights: LossWeights,
    world: World,
) -> Losses:
    """The losses of a query group with divisors over all workers.

    Where nothing can be matched, e.g. NaN boxes, a total of NaN on this worker: see
    `models.losses.unmatched_losses`.
    """
    try:
        return set_losses(
            group,
            batch.targets,
            weights,
            costs,
            reduce_sum=all_reduce_sum,
            world_size=world.size,
            blank=batch.blank,
        )
    except UnmatchableError as error:
        logger.warning("the step is left out: %s", error)
        return unmatched_losses(group, reduce_sum=all_reduce_sum)
