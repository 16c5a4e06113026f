"""`querypatch show points`: where the deformable attention of a DAT looks in pictures.

Each picture once with the points of a stage's last layer, drawn from where they lay to where they
moved, and once with the keys that are looked at, the larger and redder the more.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from finetune.artefacts import build_detector, open_weights
from finetune.classifier_weights import build_classifier
from finetune.drawing import Tile, colour_of, draw_sheet
from finetune.picture_sources import decoded, find_pictures
from finetune.predict import PreparedPicture, prepare, prepared_images
from models.artefact import PictureInput
from models.backbone import Backbone, BackboneSettings, kind_of
from models.dat_points import DeformedKeys, deformed_keys
from models.initialise import initialise
from models.interop.backbones import load_backbone
from training.recipe import load_recipe

SHORT_SIDE = 448
"""Of pictures, where the weights do not come with a size."""
BRIGHTEST = 0.1
"""This share of the keys, those looked at most, is drawn of an attention."""

_TILE_WIDTH = 560
_STAR = (255, 255, 255)
_DARK = (20, 20, 60)


def draw_points(
    weights: str,
    pictures: Sequence[str],
    out: Path,
    backbone: Sequence[str] = (),
    at_xy: tuple[float, float] | None = None,
) -> int:
    """Writes a PNG, two tiles for each picture and each stage with deformed points; returns how
    many pictures.

    `weights` is a detector or classifier of ours on a DAT; or, where `backbone` says settings of
    one (`name=dat_t`), the file of DAT's authors or `random`. `at_xy` is the query that looks, as
    shares of width and height from 0 to 1; None: all do. Raises ValueError, in one line, where
    something does not fit.
    """
    body, size = _opened(weights, backbone)
    found = find_pictures(pictures)
    if not found:
        raise ValueError("no pictures were given; name files, globs, folders or URLs")
    tiles = [tile for ref in found for tile in _tiles(ref.name, ref.url, body, size, at_xy)]
    draw_sheet(tiles, columns=2, width=_TILE_WIDTH).save(out)
    return len(found)


def _opened(weights: str, backbone: Sequence[str]) -> tuple[Backbone, PictureInput]:
    if not backbone:
        artefact = open_weights(weights)
        if artefact.kind == "classifier":
            return build_classifier(artefact).backbone, PictureInput(short_side=SHORT_SIDE)
        return build_detector(artefact).backbone, artefact.input
    settings = load_recipe(BackboneSettings, {"weights": weights}, backbone)
    if kind_of(settings.name) != "dat":
        raise ValueError(
            f"backbone.name={settings.name} has no deformed points; say name=dat_t or another DAT"
        )
    body = Backbone(settings)
    initialise(body, torch.Generator().manual_seed(0))
    load_backbone(body)
    return body, PictureInput(short_side=SHORT_SIDE)


def _tiles(
    name: str, url: str, backbone: Backbone, size: PictureInput, at_xy: tuple[float, float] | None
) -> Iterator[Tile]:
    prepared = prepare(decoded(url), size)
    pixels = prepared_images([prepared], torch.device("cpu")).pixels
    at_yx = None if at_xy is None else (at_xy[1] * prepared.size[0], at_xy[0] * prepared.size[1])
    last_of_stages = {keys.stage: keys for keys in deformed_keys(backbone, pixels, at_yx)}
    for stage, keys in last_of_stages.items():
        where = f"stage {stage + 1}, block {keys.block + 1}"
        asked = "all queries" if at_xy is None else "the query at the cross"
        yield Tile(f"{name}: points of {where}", draw_moves(prepared, keys))
        yield Tile(f"{name}: keys of {asked}, {where}", draw_attention(prepared, keys, at_yx))


def draw_moves(picture: PreparedPicture, keys: DeformedKeys) -> Image.Image:
    """A line from where each point lay to where it moved, and a dot there; a colour per group."""
    canvas, scale = _canvas(picture)
    draw = ImageDraw.Draw(canvas)
    radius = _radius(keys, scale)
    for group, points in enumerate((keys.points_yx * scale).tolist()):
        colour = colour_of(group)
        for (y, x), (from_y, from_x) in zip(
            points, (keys.reference_yx * scale).tolist(), strict=True
        ):
            draw.line((from_x, from_y, x, y), fill=colour, width=max(1, round(radius / 2)))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return canvas


def draw_attention(
    picture: PreparedPicture, keys: DeformedKeys, at_yx: tuple[float, float] | None
) -> Image.Image:
    """The keys looked at most, larger and from blue to red the more; a cross where the query is."""
    canvas, scale = _canvas(picture)
    draw = ImageDraw.Draw(canvas)
    weights = keys.attention.flatten()
    count = max(1, round(BRIGHTEST * len(weights)))
    strongest, places = weights.topk(count)
    share = (strongest / strongest[0]).tolist()
    points = (keys.points_yx.flatten(0, 1)[places] * scale).tolist()
    for (y, x), strength in reversed(list(zip(points, share, strict=True))):
        radius = _radius(keys, scale) * (1 + 3 * strength)
        colour = (round(255 * strength), round(80 * (1 - strength)), round(255 * (1 - strength)))
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=colour, outline=_DARK, width=1
        )
    if at_yx is not None:
        y, x = at_yx[0] * scale, at_yx[1] * scale
        arm = max(canvas.size) / 40
        for line in ((x - arm, y, x + arm, y), (x, y - arm, x, y + arm)):
            draw.line(line, fill=_DARK, width=7)
            draw.line(line, fill=_STAR, width=3)
    return canvas


def _canvas(picture: PreparedPicture) -> tuple[Image.Image, float]:
    """The picture as wide as a tile, darker so that points can be seen, and its enlargement."""
    scale = _TILE_WIDTH / picture.size[1]
    darker = Image.fromarray((picture.resized * np.float32(0.7)).astype(np.uint8))
    return darker.resize((_TILE_WIDTH, round(picture.size[0] * scale))), scale


def _radius(keys: DeformedKeys, scale: float) -> float:
    """Of a dot, by the distance of the first two points, in pixels of the canvas."""
    apart: float = 4 * 2**keys.stage * scale
    if len(keys.reference_yx) > 1:
        apart = float((keys.reference_yx[1] - keys.reference_yx[0]).norm()) * scale
    return min(max(apart / 8, 1.0), 6.0)
