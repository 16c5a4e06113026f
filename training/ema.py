"""An exponential moving average of the trained weights: a second model, ready to evaluate.

Only trained parameters are averaged; frozen parameters and buffers are the live model's own
tensors, so a frozen backbone is not there twice (but for its folded form, once evaluated). Costs
one fused pass over the trained parameters a step.
"""

import copy
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from models.settings import Settings


class EmaSettings(Settings):
    """The moving average of the weights."""

    decay: float = Field(default=0.9998, gt=0, lt=1)
    """Share of the average that stays at a step; (1 + step) / (10 + step) where that is less."""


class Ema:
    """`model` is the averaged copy, in evaluation mode."""

    model: nn.Module

    def __init__(self, live: nn.Module, settings: EmaSettings) -> None:
        self._decay = settings.decay
        shared = [*(p for p in live.parameters() if not p.requires_grad), *live.buffers()]
        self.model = copy.deepcopy(live, {id(tensor): tensor for tensor in shared}).eval()
        self._averaged = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self._averaged.values():
            parameter.requires_grad_(False)
        self._averages: list[Tensor] = list(self._averaged.values())
        self._live: list[Tensor] = [p for p in live.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the live weights after the update number `step`, 0 first."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._live, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged parameters by name, not copied."""
        return {name: p.detach() for name, p in self._averaged.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over an average.

        Raises:
            ValueError: the state is of other parameters.
        """
        differing = sorted(set(state) ^ set(self._averaged))
        if differing:
            raise ValueError(
                f"the moving average is of another model, first difference {differing[0]}; "
                "resume with the recipe of the run"
            )
        for name, parameter in self._averaged.items():
            parameter.copy_(state[name])
