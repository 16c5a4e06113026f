"""The pretraining objective: find the query patches, reconstruct their features (UP-DETR, 3.3)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.detection_losses import detection_losses, supervision_of, unmatched_losses
from models.losses import Reconstruction
from models.matching import UnmatchableError
from models.patch_queries import PatchOutput, draw_patch_queries
from models.structures import Losses, PatchBatch
from pretrain.recipe import PretrainRecipe
from training.world import World, all_reduce_sum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchObjective:
    """The losses of a batch; a value, so that the loop can call it with any model."""

    recipe: PretrainRecipe
    world: World

    def __call__(self, model: nn.Module, batch: PatchBatch, generator: torch.Generator) -> Losses:
        """The losses of one step; predictions that are not finite give a total of NaN."""
        recipe = self.recipe
        draws = draw_patch_queries(
            recipe.queries, recipe.model.num_queries, len(batch.images.sizes), generator
        )
        output: PatchOutput = model(batch.images, batch.patches, draws)
        return self.losses(output, batch)

    def losses(self, output: PatchOutput, batch: PatchBatch) -> Losses:
        """The losses of what the model said, with divisors over all workers."""
        try:
            return patch_losses(self.recipe, output, batch, self.world.size, all_reduce_sum)
        except UnmatchableError as error:
            logger.warning("the step is left out: %s", error)
            others = () if output.reconstructions is None else (output.reconstructions,)
            return unmatched_losses(
                output.detection,
                batch.targets,
                supervision_of(self.recipe.model),
                others=others,
                reduce_sum=all_reduce_sum,
            )


def patch_losses(
    recipe: PretrainRecipe,
    output: PatchOutput,
    batch: PatchBatch,
    world_size: int = 1,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """The losses of a batch; see `detection_losses`, whose errors pass through."""
    reconstruction = None
    if output.reconstructions is not None:
        reconstruction = Reconstruction(output.reconstructions, output.patch_features)
    return detection_losses(
        output.detection,
        batch.targets,
        recipe.losses,
        recipe.costs,
        supervision_of(recipe.model),
        reconstruction=reconstruction,
        reduce_sum=reduce_sum,
        world_size=world_size,
        blank=batch.blank,
    )
