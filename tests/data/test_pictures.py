"""Pictures: every kind decodes as Pillow decodes it, damage has a reason, sizes are DETR's."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image
from torch.nn import functional as F

from data.pictures import BrokenPicture, decode_picture, resize, resized_size

Picture = UInt8[np.ndarray, "height width 3"]


def photograph(height: int, width: int) -> Picture:
    """Shades, a hard edge and grain: what a resize or a codec can get wrong."""
    rows, columns = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).integers(-20, 21, (height, width, 3))
    shade = np.stack([3 * rows, 2 * columns, rows + columns], axis=2) % 256
    shade[:, width // 3 :] = 255 - shade[:, width // 3 :]
    return np.clip(shade + grain, 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Picture:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


PICTURE = Image.fromarray(photograph(23, 37))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("1", "PNG"),
        ("1", "TIFF"),
        ("CMYK", "TIFF"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
    ],
)
def test_every_mode_decodes_as_pillow_converts_it(mode: str, kind: str) -> None:
    data = encoded(PICTURE.convert(mode), kind)
    picture = decode_picture(data)
    assert picture.dtype == np.uint8
    assert picture.tolist() == by_pillow(data).tolist()


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 5}])
def test_jpegs_are_pillows_to_the_bit(options: dict[str, object]) -> None:
    data = encoded(PICTURE, "JPEG", **options)
    assert decode_picture(data).tolist() == by_pillow(data).tolist()


def test_a_palette_with_transparency_by_bytes_decodes_without_a_warning() -> None:
    data = encoded(PICTURE.convert("P"), "PNG", transparency=bytes(range(256)))
    assert decode_picture(data).tolist() == np.array(PICTURE.convert("P").convert("RGB")).tolist()


def test_sixteen_bits_of_grey_keep_their_shades() -> None:
    shades = np.array([[0, 255, 256, 4096, 65535]], np.uint16)
    data = encoded(Image.fromarray(shades), "PNG")
    assert decode_picture(data)[0].tolist() == [[shade] * 3 for shade in (0, 0, 1, 16, 255)]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(dtype: type) -> None:
    data = encoded(Image.fromarray(np.ones((2, 3), dtype)), "TIFF")
    with pytest.raises(BrokenPicture, match=r"mode [IF] has no defined range; store 8 or 16 bits"):
        decode_picture(data)


def test_the_orientation_in_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_picture(encoded(PICTURE, "JPEG", exif=exif)).shape == (23, 37, 3)
    assert decode_picture(encoded(PICTURE, "PNG", exif=exif)).shape == (23, 37, 3)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.6, 0.9])
def test_a_picture_that_is_cut_off_is_broken(kind: str, share: float) -> None:
    data = encoded(PICTURE, kind)
    with pytest.raises(BrokenPicture) as raised:
        decode_picture(data[: int(share * len(data))])
    assert str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_picture_is_broken() -> None:
    with pytest.raises(BrokenPicture, match="the file is empty"):
        decode_picture(b"")
    with pytest.raises(BrokenPicture, match="no picture of a known format"):
        decode_picture(b"a text\n" * 9)
    with pytest.raises(BrokenPicture, match="no picture of a known"):
        decode_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(BrokenPicture):
        decode_picture(b"\xff\xd8\xff\xe0 and then nothing of a JPEG")


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    header = struct.pack(">IIBBBBB", 70_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    png += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT"
    with pytest.raises(BrokenPicture, match=r"DecompressionBomb|70000 x 60000"):
        decode_picture(png)
    jpeg = bytearray(encoded(PICTURE, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 65_000)
    with pytest.raises(BrokenPicture, match="65000 x 60000 is more than 89478485 pixels; shrink"):
        decode_picture(bytes(jpeg))


def test_a_jpeg_with_stray_bytes_is_left_to_pillow() -> None:
    data = encoded(PICTURE, "JPEG")
    scan = data.index(b"\xff\xda")
    stray = data[:scan] + b"\x00\x00\x00" + data[scan:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(stray)
    assert decode_picture(stray).tolist() == by_pillow(data).tolist()


def test_a_warning_of_pillow_passes_through() -> None:
    data = encoded(PICTURE, "PNG")
    no_frames = b"acTL" + struct.pack(">II", 0, 0)
    chunk = struct.pack(">I", 8) + no_frames + struct.pack(">I", zlib.crc32(no_frames))
    animated = data[:33] + chunk + data[33:]
    with pytest.warns(UserWarning, match="Invalid APNG, will use default PNG image if possible"):
        assert decode_picture(animated).tolist() == by_pillow(data).tolist()


def test_a_picture_between_our_limit_and_pillows_is_refused_with_and_without_warnings() -> None:
    data = bytearray(encoded(PICTURE.convert("1"), "BMP"))
    data[18:26] = struct.pack("<ii", 10_000, 9_000)
    with pytest.raises(BrokenPicture, match="DecompressionBombWarning"):
        decode_picture(bytes(data))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(BrokenPicture, match="10000 x 9000 is more than 89478485 pixels; shrink it"),
    ):
        decode_picture(bytes(data))


@pytest.mark.parametrize(
    ("size", "short_side", "resized"),
    [
        ((375, 500), 480, (450, 600)),  # the cap: 480 would give 640
        ((500, 375), 480, (600, 450)),
        ((375, 500), 320, (320, 426)),  # 426.67 is cut off
        ((333, 500), 320, (320, 480)),
        ((320, 401), 320, (320, 401)),  # left alone
        ((300, 300), 464, (464, 464)),
        ((287, 432), 480, (399, 600)),
        ((100, 333), 336, (180, 599)),
        ((101, 333), 336, (182, 600)),
        ((97, 333), 336, (175, 600)),
        ((40, 999), 480, (24, 599)),
        ((17, 30_000), 480, (1, 1764)),  # the reference fails here: round(0.34) rows
    ],
)
def test_sizes_are_the_references(
    size: tuple[int, int], short_side: int, resized: tuple[int, int]
) -> None:
    assert resized_size(*size, short_side, 600) == resized


def test_sizes_follow_the_references_rule_everywhere() -> None:
    draws = np.random.default_rng(0).integers(17, 1200, (3000, 2)).tolist()
    for height, width in draws:
        expected = _reference_size(width, height, 416, 600)
        assert resized_size(height, width, 416, 600) == expected


def _reference_size(width: int, height: int, size: int, max_size: int) -> tuple[int, int]:
    """The rule as the reference states it (reference text, section 1.2, step 4)."""
    small, large = float(min(width, height)), float(max(width, height))
    if large / small * size > max_size:
        size = round(max_size * small / large)
    if (width <= height and width == size) or (height <= width and height == size):
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


@pytest.mark.parametrize("size", [(9, 20), (61, 35), (23, 37), (128, 128), (90, 11)])
def test_resizing_is_pillows_within_a_level(size: tuple[int, int]) -> None:
    picture = photograph(23, 37)
    expected = np.array(PICTURE.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    resized = resize(picture, *size)
    assert resized.flags.c_contiguous
    assert np.abs(resized - expected).max() <= 1
    assert np.abs(resized - expected).mean() < 0.02


def test_a_tall_picture_is_resized_as_near_to_the_exact_result_as_by_pillow() -> None:
    picture = photograph(90, 20)
    exact = torch.from_numpy(picture)[None].permute(0, 3, 1, 2).double()
    exact = F.interpolate(exact, (32, 31), mode="bilinear", antialias=True)
    exact = exact[0].permute(1, 2, 0).numpy()
    by_pillow = np.array(Image.fromarray(picture).resize((31, 32), Image.Resampling.BILINEAR))
    resized = resize(picture, 32, 31)
    assert np.abs(resized.astype(int) - by_pillow).max() <= 1
    # A hundredth of room: torch 2.11 is 0.26894 levels off, Pillow 0.26879.
    assert np.abs(resized - exact).mean() <= 1.01 * np.abs(by_pillow - exact).mean()


def test_a_view_is_resized_like_a_picture_of_its_own() -> None:
    view = photograph(40, 50)[7:30, 5:41]
    assert resize(view, 12, 9).tolist() == resize(view.copy(), 12, 9).tolist()


def test_real_photographs_decode_and_resize_as_by_pillow(shared_data: Path) -> None:
    files = sorted((shared_data / "imagenet-sample").glob("*.JPEG"))[::20]
    differences = []
    for file in files:
        image = Image.open(file).convert("RGB")
        picture = decode_picture(file.read_bytes())
        assert (picture == np.array(image)).all(), file.name
        height, width = resized_size(*picture.shape[:2], 400, 600)
        expected = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        differences.append(np.abs(resize(picture, height, width).astype(int) - expected))
    assert max(difference.max() for difference in differences) <= 1
    assert np.mean([difference.mean() for difference in differences]) < 0.006
