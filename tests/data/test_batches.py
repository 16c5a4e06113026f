"""Packed batches: what is packed, joined and normalised is what was cut, padding exactly 0."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import (
    CutPicture,
    PackedPatchBatch,
    join,
    pack,
    to_device,
    views_of,
)
from data.colour import ColourSettings, draw_colours
from data.normalise import IMAGENET_MEAN, IMAGENET_STD
from data.packing import BLANK_ID, SkippedPicture
from data.patches import PatchSample

CPU = torch.device("cpu")
BROKEN = SkippedPicture(9, "broken", "shard-000.tar", "cut off")


def test_pictures_lie_at_the_top_left_and_the_rest_is_zero() -> None:
    packed = packed_batch([(0, 2, 5), (1, 4, 3)])
    views = views_of(packed)
    assert views.pictures.shape == (2, 4, 5, 3)
    assert views.sizes.tolist() == [[2, 5], [4, 3]]
    assert views.ids.tolist() == [100, 101]
    assert torch.equal(views.pictures[0, :2], torch.from_numpy(sample(0, 2, 5).picture))
    assert int(views.pictures[0, 2:].sum()) == 0
    assert torch.equal(views.pictures[1, :, :3], torch.from_numpy(sample(1, 4, 3).picture))
    assert int(views.pictures[1, :, 3:].sum()) == 0


def test_joined_parts_are_the_batch_that_one_process_packs() -> None:
    sizes = [(0, 2, 5), (1, 4, 3), (2, 3, 3), (3, 1, 1), (4, 6, 2)]
    whole = packed_batch(sizes)
    parts = [packed_batch(sizes[0::3]), packed_batch(sizes[1::3]), packed_batch(sizes[2::3])]
    joined = join(parts)
    assert joined.streams == (0, 1, 2, 3, 4)
    assert joined.keys == ("key0", "key1", "key2", "key3", "key4")
    assert joined.shape == whole.shape
    for name, view in vars(views_of(whole)).items():
        assert torch.equal(vars(views_of(joined))[name], view), name


def test_a_part_without_pictures_joins_and_its_skipped_ones_are_kept() -> None:
    parts = [pack([], [BROKEN], 7, 2, 4), packed_batch([(1, 4, 3)])]
    joined = join(parts)
    assert joined.keys == ("key1",)
    assert joined.skipped == (BROKEN,)
    assert not joined.blank


def test_a_batch_of_broken_pictures_is_one_blank_picture_that_says_so() -> None:
    batch = to_device(join([pack([], [BROKEN], 7, 2, 4)]), CPU)
    assert batch.blank
    assert batch.keys == ()
    assert batch.skipped == ("broken",)
    assert batch.sample_ids.tolist() == [BLANK_ID]
    assert batch.images.pixels.shape == (1, 3, 64, 64)
    assert not batch.images.padding.any()
    assert batch.patches.shape == (1, 2, 3, 4, 4)
    assert batch.targets.boxes_cxcywh[0].tolist() == [[0.5, 0.5, 1.0, 1.0]] * 2


def test_pixels_are_normalised_as_in_the_reference_and_padding_is_zero_after_it() -> None:
    batch = to_device(packed_batch([(0, 2, 5), (1, 4, 3)]), CPU)
    expected = torch.zeros(2, 3, 4, 5)
    expected[0, :, :2] = to_tensor_and_normalise(sample(0, 2, 5).picture)
    expected[1, :, :, :3] = to_tensor_and_normalise(sample(1, 4, 3).picture)
    assert torch.equal(batch.images.pixels, expected)
    assert batch.images.padding[0].tolist() == [[False] * 5] * 2 + [[True] * 5] * 2
    assert batch.images.padding[1].tolist() == [[False] * 3 + [True] * 2] * 4
    assert batch.images.pixels.is_contiguous(memory_format=torch.channels_last)


def test_patches_and_their_boxes_keep_their_order() -> None:
    batch = to_device(packed_batch([(0, 2, 5), (1, 4, 3)]), CPU)
    for row in range(2):
        cut = sample(row, 2, 5) if row == 0 else sample(1, 4, 3)
        for number in range(2):
            expected = to_tensor_and_normalise(cut.patches[number])
            assert torch.equal(batch.patches[row, number], expected)
        assert batch.targets.boxes_cxcywh[row].tolist() == cut.boxes_cxcywh.tolist()
        assert batch.targets.labels[row].tolist() == [1, 1]


def test_the_packed_batch_is_not_changed_by_its_way_to_the_device() -> None:
    packed = packed_batch([(0, 2, 5), (1, 4, 3)], with_draws=True)
    before = packed.buffer.clone()
    to_device(packed, CPU)
    assert torch.equal(packed.buffer, before)


def test_colour_changes_travel_with_the_patches_to_the_device() -> None:
    packed = packed_batch([(0, 2, 5), (1, 4, 3)], with_draws=True)
    plain = to_device(packed_batch([(0, 2, 5), (1, 4, 3)]), CPU)
    changed = to_device(packed, CPU)
    assert views_of(packed).draws.shape == (2, 2, 8)
    assert not torch.equal(changed.patches, plain.patches)
    assert torch.equal(changed.images.pixels, plain.images.pixels)


@pytest.mark.gpu
def test_a_pinned_batch_on_a_gpu_is_the_batch_on_the_cpu() -> None:
    sizes = [(0, 37, 50), (1, 41, 33)]
    expected = to_device(packed_batch(sizes), CPU)
    pinned = join([packed_batch(sizes)], pin=True)
    assert pinned.buffer.is_pinned()
    batch = to_device(pinned, torch.device("cuda"))
    torch.testing.assert_close(batch.images.pixels.cpu(), expected.images.pixels)
    torch.testing.assert_close(batch.patches.cpu(), expected.patches)
    assert torch.equal(batch.images.padding.cpu(), expected.images.padding)


def packed_batch(sizes: list[tuple[int, int, int]], with_draws: bool = False) -> PackedPatchBatch:
    """Pictures given by (stream, height, width), two patches of 4 x 4 each."""
    pictures = [
        CutPicture(stream, 100 + stream, f"key{stream}", sample(stream, height, width, with_draws))
        for stream, height, width in sizes
    ]
    return pack(pictures, [], step=7, num_patches=2, patch_size=4)


def sample(seed: int, height: int, width: int, with_draws: bool = False) -> PatchSample:
    generator = np.random.default_rng(seed)
    return PatchSample(
        picture=generator.integers(0, 256, (height, width, 3), np.uint8),
        patches=generator.integers(0, 256, (2, 4, 4, 3), np.uint8),
        boxes_cxcywh=generator.random((2, 4), np.float32),
        colours=draw_colours(ColourSettings(), 2, generator) if with_draws else None,
    )


def to_tensor_and_normalise(levels: np.ndarray) -> Tensor:
    """torchvision's ToTensor and Normalize, written out."""
    unit = torch.from_numpy(levels).permute(2, 0, 1).to(torch.float32).div(255)
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    return unit.sub_(mean).div_(torch.tensor(IMAGENET_STD)[:, None, None])
