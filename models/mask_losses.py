"""What is wrong with the masks of matched queries: focal and dice loss (DETR, section 4.4).

Sigmoid focal loss (Lin et al., ICCV 2017; alpha 0.25, gamma 2) as a mean over the pixels, and dice
loss (Milletari et al., 3DV 2016) over the pixels of each mask; on the last decoder layer only. The
masks are enlarged bilinearly to the pixels of the padded batch and padding counts as background,
as in the public code. Float32 whatever the autocast.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16
from pydantic import Field
from torch import Tensor

from models.focal import ALPHA, focal_losses
from models.mask_head import MatchedMasks
from models.matching import Matching
from models.settings import Settings
from models.shares import Share
from models.structures import Losses

_GAMMA = 2.0


class MaskLossWeights(Settings):
    """How much each term of the mask loss counts."""

    focal: float = Field(default=1.0, ge=0)
    """Weight of the focal loss, mean over the pixels."""
    dice: float = Field(default=1.0, ge=0)
    """Weight of the dice loss."""


def mask_losses(
    found: MatchedMasks,
    wanted: Bool[Tensor, "masks height width"],
    num_targets: int,
    weights: MaskLossWeights,
    *,
    share: Share | None = None,
    blank: bool = False,
) -> Losses:
    """The loss of the matched masks against the true ones (`true_masks`), in their size.

    Terms are `loss_mask` and `loss_dice`, and for the log alone `unmatched_targets`. Sums are
    divided by the number of targets, at least 1, those of the whole batch where the pictures are a
    part of one (`share`); where nothing matches, and in a `blank` part, nothing is added to any
    sum, though the graph is complete.
    """
    num_pairs = found.matching.pairs_per_layer
    counted = 1.0 if num_pairs and not blank else 0.0
    count = 0 if blank else num_targets
    with torch.autocast(found.logits.device.type, enabled=False):
        share = share or Share(found.logits.new_tensor((count, num_pairs, 0), dtype=torch.float32))
        logits = F.interpolate(
            found.logits.float()[:, None], size=wanted.shape[-2:], mode="bilinear"
        )[:, 0]
        focal = counted * share.of_targets(focal_loss(logits, wanted).sum())
        dice = counted * share.of_targets(dice_loss(logits, wanted).sum())
    unmatched = share.workers * (count - num_pairs) if count else 0
    terms = {
        "loss_mask": focal.detach(),
        "loss_dice": dice.detach(),
        "unmatched_targets": focal.new_full((), unmatched),
    }
    return Losses(weights.focal * focal + weights.dice * dice, terms)


def true_masks(
    matching: Matching, segments: Int16[Tensor, "batch height width"]
) -> Bool[Tensor, "masks height width"]:
    """The true mask of each pair of a last layer; an empty one where nothing is matched.

    `segments` has n + 1 at the pixels of target n of a picture, 0 elsewhere.
    """
    if not matching.pairs_per_layer:
        return torch.zeros_like(segments[:1], dtype=torch.bool)
    return segments[matching.picture] == matching.target[:, None, None] + 1


def focal_loss(
    logits: Float[Tensor, "masks height width"], wanted: Bool[Tensor, "masks height width"]
) -> Float[Tensor, " masks"]:
    """The sigmoid focal loss of each mask, mean over its pixels."""
    return focal_losses(logits, wanted, ALPHA, _GAMMA).mean((1, 2))


def dice_loss(
    logits: Float[Tensor, "masks height width"], wanted: Bool[Tensor, "masks height width"]
) -> Float[Tensor, " masks"]:
    """1 - (2 |overlap| + 1) / (|found| + |wanted| + 1) of each mask, found by its sigmoid."""
    found = logits.sigmoid()
    overlap = (found * wanted).sum((1, 2))
    both = found.sum((1, 2)) + wanted.sum((1, 2))
    return 1 - (2 * overlap + 1) / (both + 1)
