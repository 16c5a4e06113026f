"""Fixtures of the whole suite: the small real data, and one thread so that runs compare."""

import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

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


@pytest.fixture(autouse=True)
def _levels_of_loggers() -> Iterator[None]:
    """Commands quieten loggers of this process; the next test hears them again."""
    names = ("training.run_folder", "models.interop", "data.stream")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip, saying so, where there is no CUDA device; clusters come first."""
    items.sort(key=lambda item: not starts_a_cluster(item.location[0]))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


class FilesSideBySide(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Files side by side, those that start a cluster one after the other.

    They take longest and wait most, and two of them do not fit a small machine. (xdist's own groups
    are not seen with pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "cluster" if starts_a_cluster(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FilesSideBySide:
    """How `make test` shares out the files."""
    return FilesSideBySide(config, log)


@lru_cache
def starts_a_cluster(file: str) -> bool:
    """Whether a file of tests is one of the slow ones of tests/cluster; `file` as in node ids."""
    if not file.startswith("tests/cluster/"):
        return False
    text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    return "mark.slow" in text or "mark.long" in text
