"""Fixtures of the whole suite: the small real data, and one thread so that runs compare."""

import os
from pathlib import Path

import pytest
import torch

import tests.shape_checks  # noqa: F401  (jaxtyping finds it by its name)
from tests.servers import s3_server, s3_store

__all__ = ["s3_server", "s3_store"]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small genuine ImageNet, VOC and COCO data; where it is absent the test skips."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QUERYPATCH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set QUERYPATCH_DATA to the folder that holds it")
    return folder


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip, saying so, where there is no CUDA device.

    Files run side by side (`make test`), those that start a cluster one after the other and first:
    they take longest, wait most, and two of them do not fit a small machine.
    """
    items.sort(key=lambda item: not _starts_a_cluster(item))
    for item in items:
        group = "cluster" if _starts_a_cluster(item) else item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def _starts_a_cluster(item: pytest.Item) -> bool:
    is_slow = item.get_closest_marker("slow") or item.get_closest_marker("long")
    return "tests/cluster/" in item.location[0] and is_slow is not None
