"""Where a DAT looks in a picture: its deformed points and how strongly they are looked at.

As the pictures of CVPR 2022: the points of a layer after they moved, the keys that all queries
attend to most, and those of one query. Points lie in pixels of the picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.backbone import Backbone
from models.dat import Dat, DatBlock, DatStage
from models.dat_attention import BIAS_VALUES, DatAttention

_FIRST_STRIDE = 4


@dataclass(frozen=True)
class DeformedKeys:
    """The keys of one layer for one picture."""

    stage: int
    """0 for the stage of stride 4."""
    block: int
    """Of the stage, 0 first."""
    points_yx: Float[Tensor, "groups keys 2"]
    """Where each group of channels reads its keys, in pixels."""
    reference_yx: Float[Tensor, "keys 2"]
    """Where those would lie had they not moved, in pixels."""
    attention: Float[Tensor, "groups keys"]
    """How strongly the query looks at each key, or all queries do on average: the mean of a group's
    heads, 1 in sum.
    """


@torch.no_grad()
def deformed_keys(
    backbone: Backbone,
    pixels: Float[Tensor, "1 3 height width"],
    at_yx: tuple[float, float] | None = None,
) -> tuple[DeformedKeys, ...]:
    """Of every layer with deformable attention for a normalised picture, from the first on.

    `at_yx` is a place in pixels: the query of its cell is the one that looks; where it is None all
    do. ValueError where the backbone is no DAT or the place not in the picture.
    """
    body = backbone.body
    if not isinstance(body, Dat):
        raise ValueError(
            f"backbone.name={backbone.settings.name} has no deformed points; give weights on a DAT"
        )
    height, width = pixels.shape[-2:]
    if at_yx is not None and not (0 <= at_yx[0] < height and 0 <= at_yx[1] < width):
        raise ValueError(
            f"the place (y, x) = {at_yx} is not in the picture of {height}x{width} pixels"
        )
    was_training = body.training
    seen: dict[DatAttention, Tensor] = {}

    def keep(part: DatAttention, given: tuple[Tensor]) -> None:
        seen[part] = given[0]

    layers = list(_layers(body))
    hooks = [part.register_forward_pre_hook(keep) for _, _, part in layers]
    try:
        body.eval()(pixels, 1)
    finally:
        for hook in hooks:
            hook.remove()
        body.train(was_training)
    return tuple(_of_layer(*layer, seen[layer[2]], at_yx) for layer in layers)


def _layers(body: Dat) -> Iterator[tuple[int, int, DatAttention]]:
    for number, stage in enumerate(body.stages):
        assert isinstance(stage, DatStage)
        for position, block in enumerate(stage.blocks):
            assert isinstance(block, DatBlock)
            if isinstance(block.attention, DatAttention):
                yield number, position, block.attention


def _of_layer(
    stage: int,
    block: int,
    part: DatAttention,
    features: Float[Tensor, "1 rows columns channels"],
    at_yx: tuple[float, float] | None,
) -> DeformedKeys:
    rows, columns = features.shape[1:3]
    stride = _FIRST_STRIDE * 2**stage
    points = part.points(features)
    if at_yx is None:
        chosen = torch.arange(rows * columns)
    else:
        chosen = torch.tensor([int(at_yx[0] // stride) * columns + int(at_yx[1] // stride)])
    attention = _mean_attention(part, features, chosen)
    return DeformedKeys(
        stage=stage,
        block=block,
        points_yx=_pixels(points.moved[0].flatten(1, 2), (rows, columns), stride),
        reference_yx=_pixels(points.reference.flatten(0, 1), (rows, columns), stride),
        attention=attention.view(part.kind.groups, -1, attention.shape[-1]).mean(1),
    )


def _mean_attention(
    part: DatAttention,
    features: Float[Tensor, "1 rows columns channels"],
    chosen: Int64[Tensor, " queries"],
) -> Float[Tensor, "heads keys"]:
    """Over the queries, some at a time as in the network itself."""
    at_once = max(1, BIAS_VALUES // (part.kind.heads * features[0, ..., 0].numel()))
    parts = [
        part.attention(features, chosen[start : start + at_once])[0].sum(1)
        for start in range(0, len(chosen), at_once)
    ]
    return torch.stack(parts).sum(0) / len(chosen)


def _pixels(
    points: Float[Tensor, "*points 2"], size: tuple[int, int], stride: int
) -> Float[Tensor, "*points 2"]:
    """From -1 and 1, the middles of the outermost cells."""
    last_cell = points.new_tensor(size) - 1
    cells = (points + 1) / 2 * last_cell
    return (cells + 0.5) * stride
