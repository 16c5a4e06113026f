"""Sigmoid focal loss (Lin et al., ICCV 2017, equation 5): each logit is a question of its own."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

ALPHA = 0.25
"""Weight of what is there, where a recipe cannot say it; what is not there has 1 - alpha."""

_EPS = 1e-8


def focal_losses(
    logits: Float[Tensor, "*entries"], wanted: Bool[Tensor, "*entries"], alpha: float, gamma: float
) -> Float[Tensor, "*entries"]:
    """-alpha_t (1 - p_t)^gamma log p_t of each entry, p_t the probability of the right answer."""
    mistaken = torch.where(wanted, -logits, logits)
    weight = torch.where(wanted, alpha, 1 - alpha)
    return weight * mistaken.sigmoid().pow(gamma) * F.softplus(mistaken)


def focal_costs(logits: Float[Tensor, "*entries"]) -> Float[Tensor, "*entries"]:
    """What saying yes costs more than saying no: the class cost of Deformable DETR's matching.

    alpha 0.25 and gamma 2 whatever the loss has, and 1e-8 in the logarithms, as in the public code.
    """
    probability = logits.sigmoid()
    yes = -ALPHA * (1 - probability).square() * (probability + _EPS).log()
    no = -(1 - ALPHA) * probability.square() * (1 - probability + _EPS).log()
    return yes - no
