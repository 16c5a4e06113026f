"""Colour changes: each against Pillow with given draws, on the CPU and batched, and the draws."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from operator import methodcaller

import numpy as np
import pytest
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter
from scipy.stats import chisquare
from torchvision.transforms import functional as pillow

from data.colour import (
    BLUR_TAPS,
    ORDERS,
    ColourDraws,
    ColourSettings,
    JitterStep,
    blur,
    blur_kernels,
    change_brightness,
    change_contrast,
    change_saturation,
    colour_patches,
    draw_colours,
    pack_draws,
    to_grey,
    turn_hue,
    unpack_draws,
)
from data.device_colour import colour_on_device
from data.randomness import sample_generator

Patches = UInt8[np.ndarray, "patches side side 3"]
Change = Callable[[Patches, ColourDraws], Float[np.ndarray, "patches side side 3"]]


def on_cpu(patches: Patches, draws: ColourDraws) -> Float[np.ndarray, "patches side side 3"]:
    return colour_patches(patches, draws).astype(np.float32)


def on_device(patches: Patches, draws: ColourDraws) -> Float[np.ndarray, "patches side side 3"]:
    packed = torch.from_numpy(pack_draws(draws))
    levels = colour_on_device(torch.from_numpy(patches).permute(0, 3, 1, 2), packed)
    return levels.permute(0, 2, 3, 1).numpy()


def by_pillow(patches: Patches, draws: ColourDraws) -> Float[np.ndarray, "patches side side 3"]:
    changed = [_by_pillow(patch, draws, number) for number, patch in enumerate(patches)]
    return np.stack(changed).astype(np.float32)


def _by_pillow(
    patch: UInt8[np.ndarray, "side side 3"], draws: ColourDraws, number: int
) -> np.ndarray:
    image = Image.fromarray(patch)
    brightness, contrast, saturation = draws.factors[number].tolist()
    steps = {
        JitterStep.BRIGHTNESS: lambda image: pillow.adjust_brightness(image, brightness),
        JitterStep.CONTRAST: lambda image: pillow.adjust_contrast(image, contrast),
        JitterStep.SATURATION: lambda image: pillow.adjust_saturation(image, saturation),
        JitterStep.HUE: lambda image: pillow.adjust_hue(image, float(draws.hue[number])),
    }
    for step in draws.order[number].tolist() if draws.jitter[number] else []:
        image = steps[step](image)
    if draws.grey[number]:
        image = pillow.to_grayscale(image, 3)
    if draws.blur_sigma[number] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(draws.blur_sigma[number])))
    return np.array(image)


def still(num_patches: int) -> ColourDraws:
    """Draws that change nothing."""
    return ColourDraws(
        jitter=np.zeros(num_patches, bool),
        order=np.tile(np.arange(4), (num_patches, 1)),
        factors=np.ones((num_patches, 3), np.float32),
        hue=np.zeros(num_patches, np.float32),
        grey=np.zeros(num_patches, bool),
        blur_sigma=np.zeros(num_patches, np.float32),
    )


@pytest.fixture(scope="module")
def patches() -> Patches:
    """40 patches with shades, edges, grain, flat and saturated areas."""
    generator = np.random.default_rng(3)
    return np.stack([_patch(generator) for _ in range(40)])


def _patch(generator: np.random.Generator) -> UInt8[np.ndarray, "side side 3"]:
    corners = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    shade = np.array(Image.fromarray(corners).resize((48, 48), Image.Resampling.BICUBIC))
    shade[10:30, 5:20] = generator.integers(0, 256, 3)
    grain = generator.integers(-8, 9, shade.shape)
    return np.clip(shade + grain, 0, 255).astype(np.uint8)


def worst_and_mean(
    patches: Patches, ours: Callable[[np.ndarray], np.ndarray], theirs: Callable[..., Image.Image]
) -> tuple[int, float]:
    """Largest and mean difference in levels."""
    differences = [
        np.abs(ours(patch).astype(int) - np.array(theirs(Image.fromarray(patch))))
        for patch in patches
    ]
    return np.max(differences), float(np.mean(differences))


@pytest.mark.parametrize("factor", [0.6, 0.613, 0.9, 1.0, 1.27, 1.4])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (change_brightness, pillow.adjust_brightness),
        (change_contrast, pillow.adjust_contrast),
        (change_saturation, pillow.adjust_saturation),
    ],
)
def test_a_blend_is_pillows_within_a_level(
    patches: Patches,
    ours: Callable[..., np.ndarray],
    theirs: Callable[..., Image.Image],
    factor: float,
) -> None:
    worst, mean = worst_and_mean(
        patches, lambda patch: ours(patch, factor), lambda image: theirs(image, factor)
    )
    assert worst <= 1
    assert mean < 0.01


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.013, 0.0, 0.003, 0.0501, 0.1])
def test_a_turn_of_the_hue_is_pillows(patches: Patches, turn: float) -> None:
    _, mean = worst_and_mean(
        patches,
        lambda patch: turn_hue(patch, turn),
        lambda image: pillow.adjust_hue(image, turn),
    )
    assert mean < 0.02


def test_grey_is_pillows_within_a_level(patches: Patches) -> None:
    worst, mean = worst_and_mean(patches, to_grey, lambda image: pillow.to_grayscale(image, 3))
    assert worst <= 1
    assert mean < 0.01


def test_a_blur_is_pillows_within_half_a_level_on_average(patches: Patches) -> None:
    """Most of the rest is Pillow's rounding after each of its six passes."""
    means = []
    for sigma in np.linspace(0.1, 2.0, 20).tolist():
        (kernel,) = blur_kernels(np.array([sigma], np.float32))
        pillows = methodcaller("filter", ImageFilter.GaussianBlur(sigma))
        means.append(worst_and_mean(patches, partial(blur, kernel=kernel), pillows)[1])
    assert np.mean(means) < 0.4
    assert np.max(means) < 1


def test_a_blur_kernel_is_pillows_box_three_times_over() -> None:
    short, long = blur_kernels(np.array([1.0, 2.0], np.float32)).astype(float)
    for kernel, sigma in ((short, 1.0), (long, 2.0)):
        assert len(kernel) == BLUR_TAPS
        assert kernel.sum() == pytest.approx(1, abs=1e-6)
        assert kernel.tolist() == kernel[::-1].tolist()
        variance = (kernel * (np.arange(BLUR_TAPS) - 6.0) ** 2).sum()
        assert variance == pytest.approx(sigma**2, abs=1e-5)
    edge = 1 / 4  # sigma 1: a box of 1 + 2/4 pixels
    box = np.array([edge, 1, edge]) / (1 + 2 * edge)
    assert short[3:10] == pytest.approx(np.convolve(np.convolve(box, box), box), abs=1e-6)


@pytest.mark.parametrize("change", [on_cpu, on_device])
def test_what_is_not_drawn_does_not_change(patches: Patches, change: Change) -> None:
    assert (change(patches, still(len(patches))) == patches).all()


@pytest.mark.parametrize("change", [on_cpu, on_device])
def test_all_changes_together_are_pillows(patches: Patches, change: Change) -> None:
    """Every patch with its own draws and order; without the blur almost to the level."""
    draws = draw_colours(ColourSettings(), len(patches), sample_generator(1, 2, 3))
    differences = np.abs(change(patches, draws) - by_pillow(patches, draws))
    assert differences.mean() < 0.3
    sharp = draws.blur_sigma == 0
    assert 10 < sharp.sum() < 30
    assert differences[sharp].mean() < 0.02


@pytest.mark.parametrize("change", [on_cpu, on_device])
@pytest.mark.parametrize("order", list(permutations(JitterStep)))
def test_every_order_of_the_jitter_is_kept(
    patches: Patches, change: Change, order: tuple[JitterStep, ...]
) -> None:
    few = patches[:3]
    draws = replace(
        still(3),
        jitter=np.array([True, False, True]),
        order=np.array([order, order, order[::-1]]),
        factors=np.array([[1.4, 0.6, 1.3], [0.6, 1.4, 0.6], [0.7, 1.3, 0.8]], np.float32),
        hue=np.array([0.1, -0.1, -0.07], np.float32),
    )
    changed = change(few, draws)
    expected = by_pillow(few, draws)
    assert np.abs(changed - expected).mean() < 0.2
    assert (changed[1] == few[1]).all()
    backwards = by_pillow(few, replace(draws, order=draws.order[:, ::-1]))
    assert np.abs(expected - backwards)[[0, 2]].mean() > 1  # so the bound above tells them apart


def test_the_device_agrees_with_the_cpu(patches: Patches) -> None:
    settings = ColourSettings(jitter_probability=1.0)
    draws = draw_colours(settings, len(patches), sample_generator(4, 5, 6))
    differences = np.abs(on_cpu(patches, draws) - on_device(patches, draws))
    assert differences.mean() < 0.2


def test_a_patch_changes_alike_alone_and_in_a_batch(patches: Patches) -> None:
    draws = draw_colours(ColourSettings(), len(patches), sample_generator(4, 5, 6))
    together = on_device(patches, draws)
    for number in (0, 7, 39):
        alone = ColourDraws(**{name: drawn[[number]] for name, drawn in vars(draws).items()})
        assert np.abs(on_device(patches[[number]], alone)[0] - together[number]).max() <= 1


def test_the_device_changes_no_patch_in_place_and_needs_no_layout(patches: Patches) -> None:
    draws = draw_colours(ColourSettings(), len(patches), sample_generator(4, 5, 6))
    packed = torch.from_numpy(pack_draws(draws))
    planes = torch.from_numpy(patches).permute(0, 3, 1, 2)
    before = planes.clone()
    from_view = colour_on_device(planes, packed)
    assert from_view.equal(colour_on_device(planes.contiguous(), packed))
    assert planes.equal(before)
    assert colour_on_device(planes[:0], packed[:0]).shape == (0, 3, 48, 48)


def test_autocast_does_not_reach_the_colours(patches: Patches) -> None:
    draws = draw_colours(ColourSettings(), len(patches), sample_generator(4, 5, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = on_device(patches, draws)
    assert (cast == on_device(patches, draws)).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_gpu_agrees_with_the_cpu_without_being_waited_for(patches: Patches) -> None:
    draws = draw_colours(ColourSettings(), len(patches), sample_generator(4, 5, 6))
    packed = torch.from_numpy(pack_draws(draws))
    planes = torch.from_numpy(patches).permute(0, 3, 1, 2)
    on_gpu = planes.cuda()
    colour_on_device(on_gpu, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = colour_on_device(on_gpu, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (changed.cpu() - colour_on_device(planes, packed)).abs()
    assert difference.mean() < 0.02


def test_draws_survive_their_packing() -> None:
    draws = draw_colours(ColourSettings(), 50, sample_generator(1, 1, 1))
    packed = pack_draws(draws)
    assert packed.shape == (50, 8)
    assert packed.dtype == np.float32
    for name, values in vars(unpack_draws(packed)).items():
        assert values.tolist() == vars(draws)[name].tolist(), name
        assert values.dtype == vars(draws)[name].dtype, name


@pytest.fixture(scope="module")
def many() -> ColourDraws:
    return draw_colours(ColourSettings(), 40_000, sample_generator(0, 0, 0))


def test_the_draws_have_the_references_distributions(many: ColourDraws) -> None:
    """Shares within 4 standard errors, uniform ranges by their ends, mean and deviation."""
    blurred = many.blur_sigma > 0
    for chosen, share in ((many.jitter, 0.8), (many.grey, 0.2), (blurred, 0.5)):
        assert chosen.mean() == pytest.approx(share, abs=4 * 0.5 / 200)
    uniform = [
        *((factor, 0.6, 1.4) for factor in many.factors.T),
        (many.hue, -0.1, 0.1),
        (many.blur_sigma[blurred], 0.1, 2.0),
    ]
    for drawn, low, high in uniform:
        width = high - low
        assert low <= drawn.min() < low + 0.001 * width
        assert high - 0.001 * width < drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.01 * width)
        assert drawn.std() == pytest.approx(width / 12**0.5, rel=0.02)


def test_all_orders_are_drawn_alike(many: ColourDraws) -> None:
    code = (many.order[:, None] == ORDERS).all(axis=2)
    assert (code.sum(axis=1) == 1).all()
    assert chisquare(code.sum(axis=0)).pvalue > 0.001


def test_the_draws_of_a_patch_and_of_its_neighbours_are_independent(many: ColourDraws) -> None:
    columns = pack_draws(many).T
    columns[-1] = columns[-1] > 0
    together = np.concatenate([columns[:, :-1], columns[:, 1:]])
    correlation = np.corrcoef(together) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(many.hue))


def test_a_blur_range_the_wrong_way_round_is_named() -> None:
    with pytest.raises(ValueError, match=r"min_blur_sigma=2.1 is above max_blur_sigma=2.0; swap"):
        ColourSettings(min_blur_sigma=2.1)


def test_nothing_changes_with_every_share_at_zero(patches: Patches) -> None:
    none = ColourSettings(jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0)
    draws = draw_colours(none, len(patches), sample_generator(1, 2, 3))
    assert (on_cpu(patches, draws) == patches).all()
