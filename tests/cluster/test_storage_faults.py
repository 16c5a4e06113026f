"""A run whose shards, checkpoints and lease lie in a store with bad days ends as on a good one."""

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from rich.console import Console

from cluster.preflight.inputs import resumed_recipe
from cluster.worker import run_alone
from pretrain.recipe import PretrainRecipe
from tests.faulty_store import Fault, FaultyStore, Request, faulty_store, random_faults
from tests.pretrain.small_run import small_recipe, small_shards
from tests.servers import S3Store
from training.checkpoint import list_checkpoints, load_newest
from training.lease import read_lease
from training.metrics import read_metrics
from training.run_folder import RunFolder, open_run_folder

QUIET = Console(quiet=True)
STEPS = 6


@pytest.fixture(autouse=True)
def _own_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_store: S3Store
) -> Iterator[None]:
    """Credentials the standard way; what a run sets for its process is forgotten afterwards."""
    monkeypatch.setattr(fsspec.config, "conf", dict(fsspec.config.conf))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = dict(os.environ)
    os.environ["AWS_ACCESS_KEY_ID"] = str(s3_store.storage_options["key"])
    os.environ["AWS_SECRET_ACCESS_KEY"] = str(s3_store.storage_options["secret"])
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return small_shards(tmp_path / "small")


@pytest.fixture
def good_day(shards: Path, tmp_path: Path) -> RunFolder:
    """The same run on a disk."""
    run_alone(small_recipe(shards, tmp_path / "good"), QUIET)
    return open_run_folder(str(tmp_path / "good"))


def options_for(store: S3Store) -> dict[str, object]:
    """What a recipe says of the store: all but the credentials."""
    config = dict(store.storage_options["config_kwargs"])  # type: ignore[call-overload]
    # botocore's own patience would cover what is to be seen of ours.
    config["retries"] = {"max_attempts": 0}
    return {
        "config_kwargs": config,
        "client_kwargs": store.storage_options["client_kwargs"],
    }


def recipe_on(faulty: FaultyStore, *overrides: str) -> PretrainRecipe:
    """The small run with everything in the store, through what is between."""
    told = (
        f"storage.options.s3={json.dumps(options_for(faulty.store))}",
        "data.stream.reading.first_delay_s=0.05", "data.stream.reading.longest_delay_s=0.5",
    )  # fmt: skip
    place = faulty.store.url
    return small_recipe(f"{place}/shards", f"{place}/run", *told, *overrides)  # type: ignore[arg-type]


def check_same(store: S3Store, good_day: RunFolder) -> RunFolder:
    """The run in the store, after a look at every step's loss and every weight of its last one."""
    run = open_run_folder(f"{store.url}/run", store.storage_options)
    ours, theirs = load_newest(run), load_newest(good_day)
    assert ours is not None
    assert theirs is not None
    assert ours.position == theirs.position
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in theirs.model)
    losses = [[(line["step"], line["loss"]) for line in read_metrics(r)] for r in (run, good_day)]
    assert losses[0] == losses[1]
    return run


def test_faults_of_all_kinds_change_neither_order_nor_weights(
    s3_store: S3Store, shards: Path, good_day: RunFolder
) -> None:
    s3_store.upload(shards, "shards")
    with faulty_store(s3_store, random_faults(3, 0.12, seconds=0.02)) as faulty:
        run_alone(recipe_on(faulty), QUIET)
        assert len(faulty.counts) >= 6, faulty.counts
    run = check_same(s3_store, good_day)
    assert [manifest.step for manifest in list_checkpoints(run)] == [6, 4]
    lease = read_lease(run)
    assert lease is not None
    assert lease.is_released


def test_a_store_that_is_away_for_a_while_is_waited_for(
    s3_store: S3Store, shards: Path, good_day: RunFolder
) -> None:
    s3_store.upload(shards, "shards")
    reads = list[Request]()
    back = threading.Timer(3, lambda: setattr(faulty, "is_away", False))

    def leave_at_the_fourth_read(request: Request) -> Fault:
        if request.method == "GET" and "/shards/shard-" in request.path:
            reads.append(request)
            if len(reads) == 4:
                faulty.is_away = True
                back.start()
                return Fault("status", status=500)
        return Fault()

    with faulty_store(s3_store, leave_at_the_fourth_read) as faulty:
        run_alone(recipe_on(faulty), QUIET)
        assert faulty.refused > 3
    back.join()
    run = check_same(s3_store, good_day)
    # A later process knows of the store what it is told, and then what the run's recipe says.
    fsspec.config.conf.clear()
    asked = [f"storage.options.s3={json.dumps(options_for(s3_store))}"]
    assert resumed_recipe(f"{s3_store.url}/run", asked).loop.steps == STEPS
    assert sum(float(str(line["reading/retries"])) for line in read_metrics(run)) > 0
