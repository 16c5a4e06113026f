"""What preflight makes of numbers: machines that differ, what fits, who waits, time and cost."""

import random
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

import cluster.cli.preflight as preflight_cli
import cluster.preflight.data as preflight_data
from cluster.doctor import Finding
from cluster.preflight.batches import largest_shape, padded, repeated
from cluster.preflight.checks import Check, NoAnswerError, looked_at, verdict_line, within
from cluster.preflight.forecast import Forecast, duration, forecast, pace_checks
from cluster.preflight.kit import open_kit
from cluster.preflight.memory import Seat, largest_fitting
from cluster.preflight.nodes import NodeFacts, node_checks
from cluster.preflight.trial import Pace
from finetune.recipe import FinetuneRecipe
from models.structures import DetectionBatch, PatchBatch
from tests.finetune import small_run as labelled
from tests.pretrain.small_run import small_recipe, small_shards
from training.recipe import load_recipe

CPU = torch.device("cpu")


def test_the_depths_of_the_command_are_those_of_the_look() -> None:
    assert get_args(preflight_cli.Depth) == get_args(preflight_data.Depth)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("parts"))


def _node(name: str, cpus: float = 4, **said: str) -> NodeFacts:
    told = {"python": "3.11.7, /usr/bin/python", "torch": "2.14.1, CUDA 13.0", "ray": "2.60.0"}
    told |= {"querypatch": "0.1.0", "numpy": "2.4", **said}
    found = (Finding(name, "well", words) for name, words in told.items())
    return NodeFacts(name, tuple(found), cpus, gpus=0)


def _checks(shards: Path, *nodes: NodeFacts, more: tuple[str, ...] = ()) -> dict[str, Check]:
    recipe = small_recipe(shards, shards / "run", *more)
    return {check.name: check for check in node_checks(recipe, nodes)}


def test_machines_that_are_alike_and_large_enough_are_well(shards: Path) -> None:
    found = _checks(shards, _node("a"), _node("b", python="3.11.7, /opt/python"))
    assert {check.state for check in found.values()} == {"well"}


def test_versions_that_differ_are_named_with_their_machines(shards: Path) -> None:
    found = _checks(shards, _node("a"), _node("b", torch="2.13.0, CUDA 13.0"), _node("c"))
    check = found["versions"]
    assert check.state == "fault"
    assert check.said.startswith("torch: 2.13.0 on b, 2.14.1 on a; c; use one image")
    other = _checks(shards, _node("a"), _node("b", numpy="2.3"))["versions"]
    assert (other.state, "numpy: 2.3 on b, 2.4 on a" in other.said) == ("warning", True)


def test_kernels_that_are_broken_or_slow_on_one_machine_are_named(shards: Path) -> None:
    wrong = Finding("deformable attention on cuda:0", "broken", "no kernels: build it")
    node = NodeFacts("b", (*_node("b").findings, wrong), 4, 1)
    check = _checks(shards, _node("a"), node)["kernels and packages"]
    assert (check.state, "no kernels: build it (on b)" in check.said) == ("fault", True)
    slow = Finding("deformable attention on cpu", "slow", "plain PyTorch")
    node = NodeFacts("b", (*_node("b").findings, slow), 4, 0)
    assert _checks(shards, _node("a"), node)["kernels and packages"].state == "warning"


def test_a_place_that_one_machine_does_not_see_is_named(shards: Path) -> None:
    node = NodeFacts("b", _node("b").findings, 4, 0, ("run=/home/me/run",))
    check = _checks(shards, _node("a"), node)["places"]
    assert check.state == "fault"
    assert "run=/home/me/run is not seen by b; give URLs of a store that all reach" in check.said


@pytest.mark.parametrize(
    ("workers", "cpus_per_worker", "state", "way_out"),
    [
        ("3", 2, "well", "3 workers of 2 cores find a place"),
        ("3", 3, "fault", "say resources.workers=2"),
        ("2..3", 3, "warning", "the run begins with fewer"),
        ("1", 9, "fault", "fewer resources.cpus_per_worker"),
    ],
)
def test_a_worker_needs_all_it_asks_for_on_one_machine(
    shards: Path, workers: str, cpus_per_worker: int, state: str, way_out: str
) -> None:
    asked = (f"resources.workers={workers}", f"resources.cpus_per_worker={cpus_per_worker}")
    check = _checks(shards, _node("a", 3), _node("b", 4), more=asked)["workers"]
    assert (check.state, way_out in check.said) == (state, True)


def test_a_gpu_for_each_worker_is_asked_for(shards: Path) -> None:
    node = NodeFacts("a", _node("a").findings, cpus=16, gpus=2)
    asked = ("resources.device=cuda", "resources.workers=3")
    check = _checks(shards, node, more=asked)["workers"]
    assert "2 workers of 1 core and a GPU find a place on 1 machine" in check.said
    assert check.state == "fault"


def test_the_largest_that_fits_is_found_to_a_tenth_in_few_tries() -> None:
    draw = random.Random(4)
    for limit in (0, 1, 2, 7, *(draw.randint(8, 2000) for _ in range(20))):
        tries = []

        def fits(count: int, limit: int = limit, tries: list[int] = tries) -> bool:
            tries.append(count)
            return count <= limit

        found = largest_fitting(fits, 32, 1024)
        most = min(limit, 1024)
        assert most - most // 10 - 1 < found <= most
        assert found == most or limit > 8
        assert len(tries) <= 10


def test_a_batch_is_repeated_and_padded_without_another_loss(shards: Path) -> None:
    recipe = small_recipe(shards, shards / "run")
    batch = open_kit(recipe, CPU).batch(2)
    assert isinstance(batch, PatchBatch)
    grown = repeated(batch, 5)
    assert grown.images.pixels.shape[0] == len(grown.keys) == len(grown.targets.labels) == 5
    assert torch.equal(grown.images.pixels[4], batch.images.pixels[0])
    assert torch.equal(grown.patches[3], batch.patches[1])
    height, width = batch.images.pixels.shape[-2:]
    large = padded(batch, (width + 9, height + 5) if height > width else (height + 5, width + 9))
    assert large.images.pixels.shape[-2:] == (height + 5, width + 9)
    assert torch.equal(large.images.pixels[..., :height, :width], batch.images.pixels)
    assert large.images.padding[:, height:].all()
    assert large.images.padding[:, :, width:].all()
    assert padded(large, (1, 1)) is large


def test_the_largest_picture_is_a_square_where_aspects_are_mixed(shards: Path) -> None:
    recipe = small_recipe(shards, shards / "run")
    assert largest_shape(recipe) == (48, 64)
    mixed = small_recipe(shards, shards / "run", "data.order.aspect_buckets=false")
    assert largest_shape(mixed) == (64, 64)


def test_a_detection_batch_keeps_its_boxes(tmp_path: Path) -> None:
    sets = labelled.small_sets(tmp_path)
    told = [*labelled.sets_of(sets), f"run={tmp_path / 'run'}"]
    kit = open_kit(load_recipe(FinetuneRecipe, labelled.RECIPE, told), CPU)
    batch = kit.batch(2)
    assert isinstance(batch, DetectionBatch)
    assert torch.equal(repeated(batch, 3).targets.boxes_cxcywh[2], batch.targets.boxes_cxcywh[0])
    assert kit.recipe.model.num_classes == 6


def test_time_and_cost_follow_from_the_pace(shards: Path) -> None:
    recipe = small_recipe(shards, shards / "run", "resources.workers=3", "loop.steps=1000")
    pace = Pace(
        1, step_s=0.4, wait_s=0.1, loader_pictures_per_s=9, first_batch_s=0, measured_with=1
    )
    found = forecast(recipe, pace, batches_per_epoch=3, seat=Seat(CPU, 3), cores=3, price=4.0)
    assert found == Forecast(3, pytest.approx(6.0), 1000, pytest.approx(500.0), 4.0)
    assert found.cost == pytest.approx(3 * 500 / 3600 * 4)
    shared = forecast(recipe, pace, batches_per_epoch=3, seat=Seat(CPU, 3), cores=2, price=None)
    assert (shared.seconds, shared.cost) == (pytest.approx(750.0), None)


def test_who_waits_is_told_with_as_many_loader_processes_as_would_do(shards: Path) -> None:
    recipe = small_recipe(shards, shards / "run", "data.stream.processes=2")
    slow = Pace(
        8, step_s=0.1, wait_s=0.1, loader_pictures_per_s=40, first_batch_s=0, measured_with=8
    )
    (check,) = pace_checks(recipe, slow)
    assert check.state == "warning"
    assert "waits for pictures 50 % of the time; say data.stream.processes=4" in check.said
    fast = Pace(
        8, step_s=0.1, wait_s=0.0, loader_pictures_per_s=400, first_batch_s=0, measured_with=8
    )
    (check,) = pace_checks(recipe, fast)
    assert (check.state, check.facts["pictures_per_s"]) == ("well", pytest.approx(80.0))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1.23, "1.2 s"), (45, "45 s"), (100, "2 min"), (12_000, "3 h 20 min"), (188_000, "2 d 4 h")],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_look_that_fails_is_a_fault_and_what_hangs_on_it_is_left_out() -> None:
    def fails() -> list[Check]:
        raise ValueError("it is\nwrong; mend it")

    heard = list[Check]()
    first = looked_at("first", fails, heard.append)
    second = looked_at("second", lambda: [Check("second", "well", "")], heard.append, first)
    assert [(check.state, check.said) for check in heard] == [
        ("fault", "it is wrong; mend it"),
        ("unchecked", "first mend first"),
    ]
    assert verdict_line([*first, *second]) == "not ready: first"


def test_what_does_not_answer_is_left_behind() -> None:
    with pytest.raises(NoAnswerError, match=r"a store does not answer within 0\.05 s; check"):
        within(0.05, "a store", lambda: time.sleep(1))
    with pytest.raises(PermissionError, match="no"):
        within(1, "a store", _refuses)


def _refuses() -> None:
    raise PermissionError("no")
