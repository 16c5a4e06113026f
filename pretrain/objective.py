"""The pretraining objective: find the query patches, reconstruct their features (UP-DETR, 3.3)."""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.detection_losses import detection_losses, supervision_of, unmatched_losses
from models.losses import Reconstruction
from models.matching import UnmatchableError
from models.patch_queries import PatchDraws, PatchOutput, draw_patch_queries
from models.shares import Share, counts_of
from models.structures import Losses, PatchBatch
from pretrain.recipe import PretrainRecipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchObjective:
    """The losses of a batch; a value, so that the loop can call it with any model."""

    recipe: PretrainRecipe

    def counts(self, batch: PatchBatch) -> Float[Tensor, "3"]:
        """What the losses of a batch are divided by; those of its parts add up."""
        return counts_of(batch.targets, self.recipe.model.total_queries, blank=batch.blank)

    def __call__(
        self, model: nn.Module, batch: PatchBatch, share: Share, generator: torch.Generator
    ) -> Losses:
        """The losses of one part; predictions that are not finite give a total of NaN."""
        output: PatchOutput = model(batch.images, batch.patches, self.draws(batch, generator))
        return self.losses(output, batch, share)

    def draws(self, batch: PatchBatch, generator: torch.Generator) -> PatchDraws:
        """The choices for the pictures of a part, out of those for the whole batch.

        Whoever computes a picture so finds the same ones for it.
        """
        recipe, places = self.recipe, batch.places
        whole = recipe.global_batch if places is not None else len(batch.images.sizes)
        num_queries = recipe.model.total_queries
        draws = draw_patch_queries(recipe.queries, num_queries, whole, generator)
        return draws if places is None else draws.of_pictures(places)

    def losses(self, output: PatchOutput, batch: PatchBatch, share: Share) -> Losses:
        """The losses of what the model said, as shares of those of the whole batch."""
        try:
            return patch_losses(self.recipe, output, batch, share)
        except UnmatchableError as error:
            logger.warning("the step is left out: %s", error)
            others = () if output.reconstructions is None else (output.reconstructions,)
            supervision = supervision_of(self.recipe.model)
            return unmatched_losses(output.detection, batch.targets, supervision, others=others)


def patch_losses(
    recipe: PretrainRecipe, output: PatchOutput, batch: PatchBatch, share: Share | None = None
) -> Losses:
    """The losses of a batch, or of a part of one; see `detection_losses`, whose errors pass."""
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
        share=share,
        blank=batch.blank,
    )
