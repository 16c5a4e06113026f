"""Labelled picture files with one bright rectangle each, and a model that finds it every time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from data.annotations import BoxAnnotation, annotation_json
from data.detection_set import DetectionSet
from data.picture_files import FileItem, pack_files
from data.storage import open_folder
from models.structures import Classes, DetectorOutput, GroupOutput, Images, LayerOutput, Memory

COLOURS = Classes(("red", "green", "blue"), (1, 4, 17))

Rectangle = tuple[int, int, int, int, int]
"""Left, top, right, bottom, and the channel that is bright: the label in `COLOURS`."""


def made_set(
    folder: Path, rectangles: Sequence[Rectangle], broken: Sequence[int] = ()
) -> DetectionSet:
    """Pictures of different sizes; those of the numbers in `broken` hold no picture."""
    folder.mkdir(exist_ok=True)
    items = []
    for number, rectangle in enumerate(rectangles):
        left, top, right, bottom, channel = rectangle
        height, width = 60 + 4 * (number % 5), 100 - 6 * (number % 4)
        picture = np.zeros((height, width, 3), np.uint8)
        picture[top:bottom, left:right, channel] = 255
        name = f"{number}.png"
        Image.fromarray(picture).save(folder / name)
        if number in broken:
            (folder / name).write_bytes(b"no picture")
        annotation = BoxAnnotation(
            image_id=number,
            width=width,
            height=height,
            boxes_xyxy=((float(left), float(top), float(right), float(bottom)),),
            names=(COLOURS.names[channel],),
            labels=(COLOURS.ids[channel],),
            areas=None,
            crowd=(False,),
            difficult=(False,),
        )
        items.append(FileItem(str(number), name, annotation_json(annotation), width, height))
    index, files = pack_files(open_folder(str(folder)), items)
    return DetectionSet(str(folder), "coco", index, files, COLOURS)


class RectangleFinder(nn.Module):
    """Two object queries: the bright rectangle with its colour, and a faint box in the middle.

    `labels` are the model's labels of red, green and blue.
    """

    def __init__(self, labels: tuple[int, int, int] = (0, 1, 2), num_classes: int = 3) -> None:
        super().__init__()
        self._labels = labels
        self._num_classes = num_classes

    def forward(self, images: Images) -> DetectorOutput:
        pictures = zip(images.pixels, images.sizes.tolist(), strict=True)
        answers = [self._answer(pixels[:, :height, :width]) for pixels, (height, width) in pictures]
        boxes = torch.stack([box for box, _ in answers])
        logits = torch.stack([logit for _, logit in answers])
        layer = LayerOutput(torch.zeros(*boxes.shape[:2], 4), logits, boxes)
        nothing = torch.zeros(len(boxes), 1, 4)
        memory = Memory(
            nothing, nothing, nothing[..., 0] > 0, ((1, 1),), torch.ones(len(boxes), 1, 2)
        )
        return DetectorOutput((GroupOutput("queries", (layer,)),), memory)

    def _answer(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bright = pixels > 0.2
        channel = int(bright.flatten(1).sum(1).argmax())
        rows, columns = (
            bright[channel].any(1).nonzero()[:, 0],
            bright[channel].any(0).nonzero()[:, 0],
        )
        height, width = pixels.shape[1:]
        top, bottom = int(rows.min()) / height, (int(rows.max()) + 1) / height
        left, right = int(columns.min()) / width, (int(columns.max()) + 1) / width
        box = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
        logits = torch.zeros(2, self._num_classes + 1)
        logits[0, self._labels[channel]] = 5.0
        logits[1, self._labels[0]] = 1.0
        return torch.stack([box, torch.tensor([0.5, 0.5, 0.1, 0.1])]), logits
