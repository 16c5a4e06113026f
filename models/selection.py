"""Which tokens the encoder updates (Sparse DETR, Roh et al., ICLR 2022, sections 3.2 to 3.4).

A scoring network says of every token, before the encoder, how much the decoder will look at it; the
best share rho of a picture's tokens is updated, in all layers alike. What the network learns from
is the decoder's cross-attention map (`models.selection_losses`). The paper's baselines are here
too: a detection head as the score ("objectness"), and chance.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.settings import Settings
from models.structures import TokenSelection

Criterion = Literal["dam", "objectness", "random"]


class SelectionSettings(Settings):
    """How the tokens are chosen that a sparse encoder updates; without effect where rho is null."""

    criterion: Criterion = "dam"
    """What scores a token: the decoder's attention to it, learned (the paper's choice), its own
    best class as a detector, or chance.
    """
    encoder_auxiliary: bool = True
    """Let the updated tokens also say boxes after each encoder layer but the last, in training."""
    legacy_dam: bool = False
    """Make the attention map as the released code does, half a cell too far right and down."""
    legacy_padding: bool = False
    """Let padding take part in scores, loss and counts, as in the released code."""


class TokenScorer(nn.Module):
    """The scoring network: each token beside the mean of its picture (section 3.3, appendix)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        widths = (dim, dim, dim // 2, dim // 4, 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(
        self,
        features: Float[Tensor, "batch tokens dim"],
        left_out: Bool[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch tokens"]:
        """A logit per token, float32; tokens `left_out` do not count in the mean."""
        mix, *narrow, last = self.layers
        with torch.autocast(features.device.type, enabled=False):
            mixed = F.gelu(mix(self.norm(features.to(self.norm.weight.dtype))))
            own, shared = mixed.chunk(2, dim=-1)
            mean = _mean(shared, left_out).expand_as(shared)
            scored = torch.cat((own, mean), dim=-1)
            for layer in narrow:
                scored = F.gelu(layer(scored))
            logits: Tensor = last(scored)
        return logits.squeeze(-1)


@torch.no_grad()
def select_tokens(
    ranking: Float[Tensor, "batch tokens"],
    padding: Bool[Tensor, "batch tokens"],
    rho: float,
    *,
    scores: Float[Tensor, "batch tokens"] | None = None,
    beyond_valid: bool = False,
) -> TokenSelection:
    """The int(rho * v) + 1 best of each picture's v unpadded tokens, v at the most.

    `beyond_valid` lifts that limit, as the released code does: at rho = 1 it then keeps a token of
    padding, which ranks there like the worst of the batch. The number of a batch's fullest picture
    is read back, once.
    """
    valid = (~padding).sum(1)
    counts = (valid * rho).int() + 1
    if not beyond_valid:
        counts = torch.minimum(counts, valid)
    # An ONNX graph cannot read a number back: there all tokens are gone through, few are kept.
    exporting = torch.onnx.is_in_onnx_export()
    most = padding.shape[1] if exporting else min(int(counts.max()), padding.shape[1])
    last = ranking.amin() if beyond_valid else -math.inf
    best = ranking.masked_fill(padding, last).topk(most, dim=1).indices
    kept = torch.arange(most, device=padding.device) < counts[:, None]
    indices, order = best.sort(dim=1)
    return TokenSelection(indices, kept.gather(1, order), scores)


@torch.no_grad()
def chance(padding: Bool[Tensor, "batch tokens"], training: bool) -> Float[Tensor, "batch tokens"]:
    """A ranking by chance: drawn anew in training, a fixed one otherwise."""
    if training:
        return torch.rand(padding.shape, device=padding.device)
    drawn = torch.rand(padding.shape[1], generator=torch.Generator().manual_seed(0))
    return drawn.to(padding.device).expand(padding.shape)


def _mean(
    values: Float[Tensor, "batch tokens channels"], left_out: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch 1 channels"]:
    if left_out is None:
        return values.mean(1, keepdim=True)
    counted = (~left_out)[..., None].to(values.dtype)
    return (values * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
