"""`querypatch show points`: pictures of deformed points."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.show_points import draw_points


@pytest.fixture
def picture(tmp_path: Path) -> str:
    levels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "noise.png")
    return str(tmp_path / "noise.png")


def test_each_stage_with_deformed_points_has_two_tiles(picture: str, tmp_path: Path) -> None:
    out = tmp_path / "points.png"
    backbone = ["name=dat_t", "output=layer3"]
    assert draw_points("random", [picture], out, backbone, at_xy=(0.5, 0.5)) == 1
    with Image.open(out) as sheet:
        assert sheet.width == 12 + 2 * (560 + 12)
        assert np.asarray(sheet).std() > 30


def test_what_has_no_points_is_refused_in_one_line(picture: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name=swin_t has no deformed points; say name=dat_t"):
        draw_points("random", [picture], tmp_path / "points.png", ["name=swin_t"])
