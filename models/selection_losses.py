"""What the token selection is taught, and how well it does (Sparse DETR, sections 3.2 and 3.4).

DAM, the decoder's cross-attention map: how much all queries, heads and layers of the decoder attend
to each token. The scoring network learns which tokens have the most of it, by binary cross-entropy
(equation 4). Corr is the share of that attention which meets selected tokens; it is only reported.
Padding counts in none of it, unless as in the released code (`legacy_padding`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.ops.attention_map import token_mass
from models.structures import DetectorOutput, LayerOutput, Memory, SampledAttention, TokenSelection


@torch.no_grad()
def decoder_attention_map(
    output: DetectorOutput, *, legacy_dam: bool = False
) -> Float[Tensor, "batch tokens"] | None:
    """DAM, float32, with the sum of heads * queries * layers in all; None where none is recorded.

    `legacy_dam` puts samples half a cell too far right and down, as the released code does.
    """
    maps = [
        _layer_map(layer, output.memory.spatial_shapes, legacy_dam)
        for group in output.groups
        for layer in group.layers
    ]
    known = [each for each in maps if each is not None]
    return torch.stack(known).sum(0) if known else None


@torch.no_grad()
def most_read(
    attention_map: Float[Tensor, "batch tokens"],
    padding: Bool[Tensor, "batch tokens"],
    selection: TokenSelection,
) -> Bool[Tensor, "batch tokens"]:
    """The binarised DAM: of each picture its most read tokens, as many as its selection keeps.

    Padding comes after everything else.
    """
    num_kept = selection.kept.sum(1, keepdim=True)
    ranking = attention_map.masked_fill(padding, -math.inf)
    best = ranking.topk(selection.kept.shape[1], dim=1).indices
    chosen = torch.arange(best.shape[1], device=best.device) < num_kept
    return torch.zeros_like(padding).scatter(1, best, chosen)


def scoring_losses(
    scores: Float[Tensor, "batch tokens"],
    wanted: Bool[Tensor, "batch tokens"],
    padding: Bool[Tensor, "batch tokens"],
    *,
    legacy_padding: bool = False,
) -> Float[Tensor, " batch"]:
    """Binary cross-entropy of each picture's scores, as logits, mean over its unpadded tokens.

    With `legacy_padding` the mean over all tokens, where those of padding have the least score of
    the batch: their gradients all go to the token that has it.
    """
    scores = scores.float()
    if legacy_padding:
        scores = torch.where(padding, scores.min(), scores)
        return _entropy(scores, wanted).mean(1)
    entropy = _entropy(scores.masked_fill(padding, 0.0), wanted).masked_fill(padding, 0.0)
    return entropy.sum(1) / (~padding).sum(1).clamp(min=1)


def selection_correlation(
    output: DetectorOutput, *, legacy_dam: bool = False, legacy_padding: bool = False
) -> dict[str, Tensor]:
    """Corr of a batch (equation 5), 0..1, under the names of the public code.

    `corr_mask_attn_map_dec_all`, and `corr_mask_attn_map_dec_l` of level l. Empty where nothing is
    selected or no cross-attention is recorded.
    """
    attention_map = decoder_attention_map(output, legacy_dam=legacy_dam)
    if attention_map is None or output.memory.selection is None:
        return {}
    return correlation(
        attention_map, output.memory, output.memory.selection, legacy_padding=legacy_padding
    )


@torch.no_grad()
def correlation(
    attention_map: Float[Tensor, "batch tokens"],
    memory: Memory,
    selection: TokenSelection,
    *,
    legacy_padding: bool = False,
) -> dict[str, Tensor]:
    """`selection_correlation` of a DAM: the mean over the pictures.

    A picture, or one level of it, that gets no attention is left out of the mean, which is 0 where
    all are. With `legacy_padding` attention to padding counts in the whole, tokens that only fill
    up a picture's selection count as selected, and a level without attention makes NaN.
    """
    counts = selection.kept
    if legacy_padding:
        counts = torch.ones_like(counts)
    else:
        attention_map = attention_map.masked_fill(memory.padding, 0.0)
    chosen = torch.zeros_like(memory.padding).scatter(1, selection.indices, counts)
    met = attention_map * chosen
    shares = {"all": (met.sum(1), attention_map.sum(1))}
    for level, (start, end) in enumerate(_level_bounds(memory.spatial_shapes)):
        of_level = (met[:, start:end].sum(1), attention_map[:, start:end].sum(1))
        shares[str(level)] = of_level
    mean = torch.mean if legacy_padding else _mean_of_known
    return {
        f"corr_mask_attn_map_dec_{name}": mean(part / whole)
        for name, (part, whole) in shares.items()
    }


def _layer_map(
    layer: LayerOutput, spatial_shapes: Sequence[tuple[int, int]], legacy_dam: bool
) -> Float[Tensor, "batch tokens"] | None:
    match layer.cross_attention:
        case None:
            return None
        case SampledAttention(locations, weights):
            return token_mass(
                spatial_shapes, locations.float(), weights.float(), legacy_dam=legacy_dam
            )
        case Tensor() as dense:
            return dense.float().sum((1, 2))
        case _:
            assert_never(layer.cross_attention)


def _entropy(
    scores: Float[Tensor, "batch tokens"], wanted: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    truth = wanted.to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, truth, reduction="none")


def _mean_of_known(shares: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The mean of what is a number: 0 / 0 is none."""
    known = ~shares.isnan()
    return shares.nan_to_num(0.0).sum() / known.sum().clamp(min=1)


def _level_bounds(spatial_shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """First token of each level, and the one after its last."""
    start = 0
    for rows, columns in spatial_shapes:
        yield start, start + rows * columns
        start += rows * columns
