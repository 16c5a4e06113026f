"""Packed detection batches: what is packed, joined and put on a device is what was made."""

import numpy as np
import pytest
import torch

from data.detection_batches import (
    PackedDetectionBatch,
    ReadyPicture,
    TargetForm,
    detection_to_device,
    detection_views,
    join_detection,
    pack_detection,
)
from data.detection_transforms import BoxedPicture
from data.packing import BLANK_ID, SkippedPicture

CPU = torch.device("cpu")
BROKEN = SkippedPicture(9, "broken", "broken.jpg", "cut off")
ONE_SHOT_PANOPTIC = TargetForm(num_patches=1, patch_size=3, has_segments=True)

Sizes = list[tuple[int, int, int, int]]
"""(stream, height, width, boxes) of each picture."""

FIVE: Sizes = [(0, 2, 5, 2), (1, 4, 3, 0), (2, 3, 3, 1), (3, 1, 1, 3), (4, 6, 2, 0)]


def test_boxes_are_normalised_to_their_own_picture_not_to_the_padded_batch() -> None:
    boxed = BoxedPicture(
        np.zeros((4, 10, 3), np.uint8),
        np.array([[2.0, 1.0, 7.0, 4.0]], np.float32),
        np.array([5], np.int64),
    )
    other = made(1, 8, 20, 0)
    packed = pack_detection([ReadyPicture(0, 1, "a", boxed), other], [], 7, {})
    batch = detection_to_device(packed, CPU)
    assert batch.images.pixels.shape == (2, 3, 8, 20)
    torch.testing.assert_close(
        batch.targets.boxes_cxcywh[0], torch.tensor([[0.45, 0.625, 0.5, 0.75]])
    )
    assert batch.targets.labels[0].tolist() == [5]


def test_a_picture_without_boxes_has_targets_of_shape_0_by_4() -> None:
    """Peers' bug 5: empty targets are first class."""
    batch = detection_to_device(packed(FIVE), CPU)
    assert [tuple(boxes.shape) for boxes in batch.targets.boxes_cxcywh] == [
        (2, 4), (0, 4), (1, 4), (3, 4), (0, 4),
    ]  # fmt: skip
    assert [len(labels) for labels in batch.targets.labels] == [2, 0, 1, 3, 0]
    assert batch.targets.labels[1].dtype == torch.int64


@pytest.mark.parametrize("form", [TargetForm(), ONE_SHOT_PANOPTIC])
def test_joined_parts_are_the_batch_that_one_process_packs(form: TargetForm) -> None:
    whole = packed(FIVE, form)
    joined = join_detection([packed(FIVE[start::3], form) for start in range(3)])
    assert joined.streams == (0, 1, 2, 3, 4)
    assert joined.keys == whole.keys
    assert joined.box_counts == whole.box_counts == (2, 0, 1, 3, 0)
    assert joined.shape == whole.shape
    for name, view in vars(detection_views(whole)).items():
        assert torch.equal(vars(detection_views(joined))[name], view), name


def test_query_crops_and_segments_travel_with_their_picture() -> None:
    ready = [made(*size, form=ONE_SHOT_PANOPTIC) for size in FIVE]
    batch = detection_to_device(pack_detection(ready, [], 7, {}, ONE_SHOT_PANOPTIC), CPU)
    assert batch.query_patches is not None
    assert batch.segments is not None
    assert batch.query_patches.shape == (5, 1, 3, 3, 3)
    assert batch.segments.shape == (5, 6, 5)
    segments = ready[2].boxed.segments
    assert segments is not None
    assert batch.segments[2, :3, :3].tolist() == segments.tolist()
    assert int(batch.segments[2, 3:].abs().sum() + batch.segments[2, :, 3:].abs().sum()) == 0
    crops = ready[3].query_patches
    assert crops is not None
    level = float(crops[0, 1, 2, 0]) / 255
    torch.testing.assert_close(
        float(batch.query_patches[3, 0, 0, 1, 2]), (level - 0.485) / 0.229, atol=1e-5, rtol=0
    )


def test_a_task_without_crops_and_segments_has_none() -> None:
    batch = detection_to_device(packed(FIVE), CPU)
    assert batch.query_patches is None
    assert batch.segments is None


def test_counts_of_the_parts_are_added_up() -> None:
    parts = [
        pack_detection([made(0, 2, 2, 1)], [], 7, {"boxes": 3, "boxes_crowd": 1}),
        pack_detection([made(1, 2, 2, 1)], [BROKEN], 7, {"boxes": 4, "boxes_crowd": 0}),
    ]
    joined = join_detection(parts)
    assert joined.counts == {"boxes": 7, "boxes_crowd": 1}
    assert joined.skipped == (BROKEN,)
    assert joined.count == 2


def test_a_batch_of_broken_pictures_is_one_blank_picture_that_says_so() -> None:
    parts = [pack_detection([], [BROKEN], 7, {"boxes": 0}, ONE_SHOT_PANOPTIC)] * 2
    joined = join_detection(parts)
    assert (joined.blank, joined.count, joined.step) == (True, 0, 7)
    batch = detection_to_device(joined, CPU)
    assert batch.blank
    assert batch.keys == ()
    assert batch.skipped == ("broken", "broken")
    assert batch.sample_ids.tolist() == [BLANK_ID]
    assert batch.images.pixels.shape == (1, 3, 64, 64)
    assert batch.targets.boxes_cxcywh[0].shape == (0, 4)
    assert batch.query_patches is not None
    assert batch.query_patches.shape == (1, 1, 3, 3, 3)
    assert batch.segments is not None
    assert batch.segments.shape == (1, 64, 64)


def test_the_packed_batch_is_not_changed_by_its_way_to_the_device() -> None:
    batch = packed(FIVE, ONE_SHOT_PANOPTIC)
    before = batch.buffer.clone()
    detection_to_device(batch, CPU)
    assert torch.equal(batch.buffer, before)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_pinned_batch_comes_to_a_gpu_without_waiting_for_it() -> None:
    expected = detection_to_device(packed(FIVE, ONE_SHOT_PANOPTIC), CPU)
    pinned = join_detection([packed(FIVE, ONE_SHOT_PANOPTIC)], pin=True)
    assert pinned.buffer.is_pinned()
    device = torch.device("cuda")
    detection_to_device(pinned, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = detection_to_device(pinned, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(batch.images.pixels.cpu(), expected.images.pixels)
    for found, wanted in zip(
        batch.targets.boxes_cxcywh, expected.targets.boxes_cxcywh, strict=True
    ):
        assert torch.equal(found.cpu(), wanted)


def packed(sizes: Sizes, form: TargetForm | None = None) -> PackedDetectionBatch:
    form = form or TargetForm()
    return pack_detection([made(*size, form=form) for size in sizes], [], 7, {}, form)


def made(
    stream: int, height: int, width: int, boxes: int, form: TargetForm | None = None
) -> ReadyPicture:
    generator = np.random.default_rng(stream)
    form = form or TargetForm()
    corners = generator.random((boxes, 2), np.float32)
    boxed = BoxedPicture(
        picture=generator.integers(0, 256, (height, width, 3), np.uint8),
        boxes_xyxy=np.concatenate([corners, corners + 1], axis=1),
        labels=generator.integers(0, 9, boxes),
        segments=generator.integers(0, 3, (height, width), np.int16) if form.has_segments else None,
    )
    crops = (form.num_patches, form.patch_size, form.patch_size, 3)
    query = generator.integers(0, 256, crops, np.uint8) if form.num_patches else None
    return ReadyPicture(stream, 100 + stream, f"key{stream}", boxed, query)
