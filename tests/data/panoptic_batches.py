"""Samples and the first training batch of a panoptic set."""

import torch

from data.detection_batches import PackedDetectionBatch, detection_to_device
from data.detection_set import DetectionSet
from data.detection_transforms import AugmentSettings
from data.loader import StreamSettings, StreamSource
from data.order import OrderSettings
from data.panoptic_content import PanopticContent
from data.picture_files import open_reader, read_one
from data.reading import ReadingSettings
from data.samples import Sample
from data.stream import ExactStream
from models.structures import DetectionBatch


def sample_of(data: DetectionSet, id: int) -> Sample:
    reader = open_reader(data.index, data.files, {}, ReadingSettings())
    return read_one(data.index, reader, id)


def first_batch(data: DetectionSet, kind: str) -> DetectionBatch:
    augment = AugmentSettings.model_validate(
        {
            "kind": kind,
            "short_sides": (64, 80),
            "max_size": 160,
            "crop_short_sides": (48, 60),
            "crop_sides": (40, 60),
        }
    )
    stream: ExactStream[PackedDetectionBatch] = ExactStream(
        StreamSource(
            index=data.index,
            seed=3,
            global_batch=data.index.num_samples,
            content=PanopticContent(data.classes, augment),
            order=OrderSettings(),
            files=data.files,
        ),
        StreamSettings(processes=0),
    )
    batches = stream.from_step(0)
    packed = next(batches)
    batches.close()
    return detection_to_device(packed, torch.device("cpu"))
