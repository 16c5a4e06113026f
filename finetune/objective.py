"""The detection objective: every object to one query, every other query to none (DETR, 3.1)."""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from models.detection_losses import Supervision, detection_losses, unmatched_losses
from models.losses import LossWeights
from models.matching import MatchingCosts, UnmatchableError
from models.structures import DetectionBatch, DetectorOutput, Losses
from training.world import World, all_reduce_sum

logger = logging.getLogger(__name__)

AS_DETR = Supervision()


@dataclass(frozen=True)
class DetectionObjective:
    """The losses of a batch; a value, so that the loop can call it with any model."""

    costs: MatchingCosts
    weights: LossWeights
    world: World
    supervision: Supervision = AS_DETR
    """As the detector's settings say; see `models.detection_losses.supervision_of`."""

    def __call__(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        generator: torch.Generator,  # noqa: ARG002  (nothing is drawn)
    ) -> Losses:
        """The losses of one step; predictions that are not finite give a total of NaN."""
        output: DetectorOutput = model(batch.images)
        return self.losses(output, batch)

    def losses(self, output: DetectorOutput, batch: DetectionBatch) -> Losses:
        """The losses of what the model said, with divisors over all workers.

        Where nothing can be matched, e.g. NaN boxes, a total of NaN on this worker: see
        `models.detection_losses.unmatched_losses`.
        """
        try:
            return detection_losses(
                output,
                batch.targets,
                self.weights,
                self.costs,
                self.supervision,
                reduce_sum=all_reduce_sum,
                world_size=self.world.size,
                blank=batch.blank,
            )
        except UnmatchableError as error:
            logger.warning("the step is left out: %s", error)
            return unmatched_losses(
                output, batch.targets, self.supervision, reduce_sum=all_reduce_sum
            )
