"""The smallest question to deformable attention: does anything answer on a device, and rightly?"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.ops.deformable import deformable_attention

Operator = Callable[[Tensor, tuple[tuple[int, int], ...], Tensor, Tensor], Tensor]
"""`models.ops.deformable.deformable_attention`, or what must say the same."""


def sampled_once(
    device: torch.device, operator: Operator = deformable_attention
) -> tuple[Tensor, Tensor]:
    """One query's samples of a map of 2 x 3 cells, and the gradient of its values.

    Raises RuntimeError where the operator has nothing that may run on the device.
    """
    values = torch.arange(24, dtype=torch.float32, device=device).view(1, 6, 1, 4) / 8
    values.requires_grad_()
    where = torch.tensor([[0.3, 0.4], [0.9, 0.2]], device=device).view(1, 1, 1, 1, 2, 2)
    weights = torch.tensor([0.25, 0.75], device=device).view(1, 1, 1, 1, 2)
    sampled = operator(values, ((2, 3),), where, weights)
    (gradient,) = torch.autograd.grad(sampled.square().sum(), values)
    return sampled.detach(), gradient
