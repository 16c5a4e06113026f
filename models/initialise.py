"""Random weights of a detector from an explicit generator, with DETR's distributions.

Transformer: Xavier-uniform matrices, attention biases 0; heads and projections: torch's defaults;
queries N(0, 1); learned positions U(0, 1); ResNet convolutions: He-normal over the outputs, as
torchvision. The same generator state gives the same weights on every rank and machine.
"""

import math

import torch
from torch import nn

from models.attention import Attention
from models.position import LearnedPositions
from models.transformer import FeedForward


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight of a module anew, in the order of its parts."""
    for part in module.children():
        initialise(part, generator)
    with torch.no_grad():
        _draw(module, generator)


def _draw(part: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights that this part owns, after those of the parts inside it."""
    match part:
        case Attention():
            nn.init.xavier_uniform_(part.in_proj_weight, generator=generator)
            nn.init.zeros_(part.in_proj_bias)
            nn.init.xavier_uniform_(part.out_proj.weight, generator=generator)
            nn.init.zeros_(part.out_proj.bias)
        case FeedForward():
            nn.init.xavier_uniform_(part.widen.weight, generator=generator)
            nn.init.xavier_uniform_(part.narrow.weight, generator=generator)
        case LearnedPositions():
            nn.init.uniform_(part.rows.weight, generator=generator)
            nn.init.uniform_(part.columns.weight, generator=generator)
        case nn.Linear():
            bound = 1 / math.sqrt(part.in_features)
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        case nn.Conv2d():
            nn.init.kaiming_normal_(
                part.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
        case nn.Embedding():
            nn.init.normal_(part.weight, generator=generator)
        case _:
            pass
