"""Fixtures of the whole suite: the small real data, and one thread so that runs compare."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small genuine ImageNet, VOC and COCO data; the test skips, saying so, where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QUERYPATCH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set QUERYPATCH_DATA to the folder that holds it")
    return folder
