"""Workers agree, train as one, and resume to the last bit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.small import (
    CPU,
    KeptCheckpoints,
    NumberBatch,
    number_batch,
    small_job,
    small_state,
    surroundings,
)
from tests.training.test_loop import squares
from tests.training.workers import on_workers
from training.checkpoint import load_newest, resume, save_checkpoint
from training.job import LoopSettings
from training.loop import NonFiniteLoss, train
from training.metrics import Journal, StepRecord, read_metrics
from training.parallel import parallel_model
from training.run_folder import open_run_folder
from training.snapshot import Position, TrainingState, restore, take_snapshot
from training.uploads import Uploads
from training.world import World, all_reduce_sum, barrier, broadcast_object, gather_objects


def test_alone_every_word_is_the_identity() -> None:
    alone = World.alone(CPU)
    tensor = torch.tensor([2.0, 3.0])
    assert all_reduce_sum(tensor).tolist() == [2.0, 3.0]
    assert broadcast_object({"a": 1}, alone) == {"a": 1}
    assert gather_objects("x") == ("x",)
    barrier()
    assert alone.is_first


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank=2 is not one of the 2 workers; use 0\.\.1"):
        World(2, 2, CPU)


def exchange_words(rank: int, folder: Path) -> None:
    world = World(rank, 2, CPU)
    mine = torch.tensor([1.0 + rank, 10.0])
    assert all_reduce_sum(mine).tolist() == [3.0, 20.0]
    assert mine.tolist() == [1.0 + rank, 10.0]
    assert broadcast_object(f"from {rank}", world) == "from 0"
    assert gather_objects(f"from {rank}") == ("from 0", "from 1")
    barrier()


def pictures_of(rank: int, first: int, bad: tuple[int, int] | None) -> Iterator[NumberBatch]:
    """Worker 0 takes two pictures of each batch, worker 1 the third; `bad` is (rank, number)."""
    for number in range(first, 10**6):
        whole = number_batch(number)
        part = slice(0, 2) if rank == 0 else slice(2, 3)
        rows = whole.rows[part] * (float("nan") if bad == (rank, number) else 1.0)
        yield replace(whole, rows=rows, keys=whole.keys[part])


def weighted_squares(model: torch.nn.Module, batch: NumberBatch, generator: object) -> object:
    """The mean over the three pictures of both workers, as DDP averages: times 2 workers / 3."""
    losses = squares(model, batch, generator)
    return replace(losses, total=losses.total * len(batch.keys) * 2 / 3)


def train_as(
    rank: int,
    settings: LoopSettings,
    bad: tuple[int, int] | None = None,
    **around: object,
) -> tuple[Position, list[StepRecord], torch.nn.Module, KeptCheckpoints]:
    kept, records = KeptCheckpoints(), []
    state = small_state(model=torch.nn.Linear(4, 2))
    with torch.no_grad():
        state.model.weight.copy_(torch.arange(8.0).view(2, 4) / 8)
        state.model.bias.zero_()
    world = World(rank, 2, CPU)
    job = replace(
        small_job(state, settings, objective=weighted_squares),
        batches=pictures_of(rank, 0, bad),
        model=parallel_model(state.model, world, compiled=False),
        world=world,
    )
    told = replace(surroundings(kept), report=records.append, **around)
    return train(job, told, Position()), records, state.model, kept


def train_together(rank: int, folder: Path) -> None:
    for accumulate in (1, 2):
        settings = LoopSettings(steps=4, log_every=3, accumulate=accumulate)
        position, records, model, _ = train_as(rank, settings)
        assert position.pictures == 12 * accumulate
        losses = gather_objects([record.losses["total"] for record in records])
        assert losses[0] == losses[1]
        torch.save((model.state_dict(), losses[0]), folder / f"accumulate{accumulate}_{rank}.pt")


def stop_together(rank: int, folder: Path) -> None:
    polls = iter(range(1, 99))
    settings = LoopSettings(steps=9)
    position, _, _, kept = train_as(rank, settings, stop=lambda: rank == 1 and next(polls) == 3)
    assert position.step == 3
    assert kept.saved == [(3, {})]


def fail_together(rank: int, folder: Path) -> None:
    uploads = Uploads()
    run = open_run_folder(str(folder / "run"))
    journal = Journal(run, uploads, 0, lambda: 0.0) if rank == 0 else None
    with pytest.raises(NonFiniteLoss, match=r"step 2: .* pictures b1p2;"):
        train_as(rank, LoopSettings(steps=9, max_bad_steps=1), bad=(1, 1), journal=journal)
    if journal:
        journal.close()
        bad = next(line for line in read_metrics(run) if line["kind"] == "bad_step")
        assert bad["keys"] == [["b1p0", "b1p1"], ["b1p2"]]
        assert bad["losses"][1] == "nan"
    uploads.close()


def resume_together(rank: int, folder: Path) -> None:
    run = open_run_folder(str(folder / "run"))
    world = World(rank, 2, CPU)
    if world.is_first:
        save_checkpoint(run, take_snapshot(small_state(), Position(step=3), 1), {}, "digest")
    barrier()
    state = small_state()
    with torch.no_grad():
        state.model.head.weight.zero_()
    assert resume(run, state, world) == Position(step=3)
    stored = load_newest(run)
    assert stored is not None
    assert torch.equal(state.model.head.weight, stored.model["head.weight"])
    assert state.model.head.weight.abs().sum() > 0
    gone = open_run_folder(str(folder / "empty"))
    assert resume(gone, state, world) == Position()


def keep_buffers(rank: int, folder: Path) -> None:
    """Each worker's own buffer stays; a broadcast would also make a frozen backbone fold anew."""
    model = torch.nn.Linear(4, 2)
    model.register_buffer("constant", torch.zeros(1))
    wrapped = parallel_model(model, World(rank, 2, CPU), compiled=False)
    model.constant.fill_(rank)
    wrapped(torch.ones(3, 4)).sum().backward()
    assert model.constant.item() == rank
    assert model.weight.grad.tolist() == [[3.0] * 4] * 2


@pytest.mark.parametrize(
    "function", [exchange_words, stop_together, fail_together, resume_together, keep_buffers]
)
def test_two_workers(function: object, tmp_path: Path) -> None:
    on_workers(function, tmp_path)


def train_and_resume(rank: int, folder: Path) -> None:
    """Four updates in one go, and the same ones by two starts, of three workers."""
    world, settings = World(rank, 3, CPU), LoopSettings(steps=4)
    ends = []
    for stops in ((4,), (2, 4)):
        kept = deep_state()
        for stop in stops:
            state = deep_state()
            restore(state, take_snapshot(kept, Position(), 3), "kept")
            start = Position(step=0 if stop == stops[0] else stops[0])
            job = replace(
                small_job(state, settings, start, objective=squares),
                batches=(number_batch(3 * number + rank) for number in range(start.step, 99)),
                model=parallel_model(state.model, world, compiled=False),
                world=world,
            )
            polls = iter(range(start.step + 1, 99))
            around = replace(surroundings(), stop=lambda: next(polls) == stop)  # noqa: B023
            assert train(job, around, start).step == stop
            kept = state
        ends.append([parameter.detach() for parameter in kept.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def deep_state() -> TrainingState:
    torch.manual_seed(2)
    layers = [torch.nn.Linear(4 if depth == 0 else 40, 40) for depth in range(6)]
    return small_state(model=torch.nn.Sequential(*layers))


def test_three_workers_resume_to_the_last_bit(tmp_path: Path) -> None:
    on_workers(train_and_resume, tmp_path, size=3)


def test_two_workers_with_unequal_parts_train_as_one(tmp_path: Path) -> None:
    on_workers(train_together, tmp_path)
    for accumulate in (1, 2):
        ends = [torch.load(tmp_path / f"accumulate{accumulate}_{rank}.pt") for rank in range(2)]
        assert torch.equal(ends[0][0]["weight"], ends[1][0]["weight"])
        state = small_state(model=torch.nn.Linear(4, 2))
        with torch.no_grad():
            state.model.weight.copy_(torch.arange(8.0).view(2, 4) / 8)
            state.model.bias.zero_()
        records: list[StepRecord] = []
        settings = LoopSettings(steps=4, log_every=3, accumulate=accumulate)
        around = replace(surroundings(), report=records.append)
        train(small_job(state, settings, objective=squares), around, Position())
        torch.testing.assert_close(ends[0][0]["weight"], state.model.weight.detach())
        torch.testing.assert_close(ends[0][1], [record.losses["total"] for record in records])
