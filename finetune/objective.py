"""The detection objective: every object to one query, every other query to none (DETR, 3.1)."""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.detection_losses import Supervision, detection_losses, unmatched_losses
from models.losses import LossWeights
from models.matching import MatchingCosts, UnmatchableError
from models.shares import Share, counts_of
from models.structures import DetectionBatch, DetectorOutput, Losses

logger = logging.getLogger(__name__)

AS_DETR = Supervision()


@dataclass(frozen=True)
class DetectionObjective:
    """The losses of a batch; a value, so that the loop can call it with any model."""

    costs: MatchingCosts
    weights: LossWeights
    num_queries: int
    """Of the detector."""
    supervision: Supervision = AS_DETR
    """As the detector's settings say; see `models.detection_losses.supervision_of`."""

    def counts(self, batch: DetectionBatch) -> Float[Tensor, "3"]:
        """What the losses of a batch are divided by; those of its parts add up."""
        return counts_of(batch.targets, self.num_queries, blank=batch.blank)

    def __call__(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        share: Share,
        generator: torch.Generator,  # noqa: ARG002  (nothing is drawn)
    ) -> Losses:
        """The losses of one part; predictions that are not finite give a total of NaN."""
        output: DetectorOutput = model(batch.images)
        return self.losses(output, batch, share)

    def losses(self, output: DetectorOutput, batch: DetectionBatch, share: Share) -> Losses:
        """The losses of what the model said, as shares of those of the whole batch.

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
                share=share,
                blank=batch.blank,
            )
        except UnmatchableError as error:
            logger.warning("the step is left out: %s", error)
            return unmatched_losses(output, batch.targets, self.supervision)
