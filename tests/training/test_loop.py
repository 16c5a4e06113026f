"""The loop: updates by hand, bad steps, and resuming exactly."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.structures import Losses
from tests.training.small import (
    CPU,
    DropoutLine,
    KeptCheckpoints,
    NumberBatch,
    line_objective,
    number_batch,
    number_batches,
    small_job,
    small_state,
    surroundings,
)
from training.checkpoint import resume
from training.checkpoint_writer import CheckpointWriter
from training.ema import EmaSettings
from training.job import LoopSettings, Scoring, Surroundings, plan_steps
from training.loop import NonFiniteLoss, batch_generator, seed_dropout, train
from training.metrics import Journal, StepRecord, read_metrics
from training.optimiser import OptimiserSettings, build_optimiser
from training.retention import RetentionSettings
from training.run_folder import RunFolder, open_run_folder
from training.snapshot import Position, TrainingState
from training.uploads import Uploads
from training.world import World


def weights(state: TrainingState) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in state.model.state_dict().items()}


def run_in(
    folder: RunFolder, state: TrainingState, settings: LoopSettings, stop_after: int | None = None
) -> Position:
    """One start of a run in `folder`, as the assembly does it."""
    uploads = Uploads()
    start = resume(folder, state, World.alone(CPU))
    writer = CheckpointWriter(folder, uploads, RetentionSettings(), World.alone(CPU), "digest")
    journal = Journal(folder, uploads, start.step, time.monotonic)
    polls = iter(range(1, 1000))
    around = Surroundings(
        checkpoints=writer,
        clock=time.monotonic,
        stop=lambda: next(polls) == stop_after,
        journal=journal,
        evaluate=draws_random_numbers,
    )
    end = train(small_job(state, settings, start), around, start)
    journal.close()
    uploads.close()
    return end


def draws_random_numbers(model: nn.Module, alive: Callable[[], None]) -> Scoring:
    assert not model.training
    return lambda: {"ap": torch.rand(()).item()}


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    settings = LoopSettings(
        steps=9, log_every=1, evaluate_every=4, checkpoint_every_steps=2, accumulate=2
    )
    whole, parts = (open_run_folder(str(tmp_path / name)) for name in ("whole", "parts"))
    uninterrupted = small_state(EmaSettings(decay=0.5))
    end = run_in(whole, uninterrupted, settings)
    assert run_in(parts, small_state(EmaSettings(decay=0.5)), settings, stop_after=3).step == 3
    assert run_in(parts, small_state(EmaSettings(decay=0.5)), settings, stop_after=1).step == 4
    continued = small_state(EmaSettings(decay=0.5))
    assert run_in(parts, continued, settings) == end == Position(9, 3, 3, pictures=54)
    assert weights(continued) == weights(uninterrupted)
    for name, average in uninterrupted.ema.state().items():
        assert torch.equal(continued.ema.state()[name], average)
    assert losses_by_step(parts) == losses_by_step(whole)
    assert list(losses_by_step(whole)) == list(range(1, 10))


def losses_by_step(folder: RunFolder) -> dict[int, tuple[float, ...]]:
    lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: (line["loss"], line["loss/squares"], line["grad_norm"]) for line in lines}


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    end = run_in(folder, small_state(), LoopSettings(steps=5))
    again = small_state()
    assert run_in(folder, again, LoopSettings(steps=5)) == end
    assert end == Position(step=5, epoch=1, batch=0, pictures=15)


def test_a_run_resumed_exactly_at_the_end_of_an_epoch_goes_on(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    stopped = run_in(folder, small_state(), LoopSettings(steps=8), stop_after=5)
    assert (stopped.step, stopped.epoch, stopped.batch) == (5, 1, 0)
    assert run_in(folder, small_state(), LoopSettings(steps=8)).step == 8


def test_dropout_depends_on_seed_step_and_rank_alone() -> None:
    def draw(*place: int) -> float:
        seed_dropout(*place)
        return torch.rand(()).item()

    first = draw(7, 3, 0)
    torch.rand(100)
    assert draw(7, 3, 0) == first
    assert len({first, draw(8, 3, 0), draw(7, 4, 0), draw(7, 3, 1)}) == 4


def test_what_the_objective_draws_depends_on_the_seed_and_the_batch_alone() -> None:
    def draw(*place: int) -> float:
        return torch.rand((), generator=batch_generator(*place)).item()

    assert draw(7, 3) == draw(7, 3)
    assert len({draw(7, 3), draw(8, 3), draw(7, 4)}) == 3


def squares(model: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
    return Losses((model(batch.rows) ** 2).mean(), {})


def joined_batches(first: int) -> Iterator[NumberBatch]:
    """The pictures of three batches in one."""
    for number in range(first, 10**6):
        parts = [number_batch(3 * number + part, rows=2) for part in range(3)]
        yield NumberBatch(
            torch.cat([part.rows for part in parts]), sum((part.keys for part in parts), ())
        )


def pair_batches(first: int) -> Iterator[NumberBatch]:
    yield from (number_batch(number, rows=2) for number in range(first, 10**6))


def test_accumulated_batches_give_the_gradient_of_the_big_batch() -> None:
    torch.manual_seed(3)
    line = nn.Linear(4, 2)
    ends = []
    for settings, batches in (
        (LoopSettings(steps=4, accumulate=3), pair_batches),
        (LoopSettings(steps=4), joined_batches),
    ):
        state = small_state(model=copy.deepcopy(line))
        job = small_job(state, settings, batches=batches, objective=squares)
        end = train(job, surroundings(), Position())
        assert end.pictures == 24
        ends.append(state.model.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ends[0], line.weight)


def test_one_step_is_the_hand_written_step() -> None:
    state, twin = small_state(), small_state().model
    train(small_job(state, LoopSettings(steps=1)), surroundings(), Position())
    optimiser = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=1e-4, fused=True)
    seed_dropout(7, 0, 0)
    line_objective(twin, number_batch(0), batch_generator(7, 0)).total.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    optimiser.step()
    for ours, theirs in zip(state.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def poisoned(numbers: set[int], value: float) -> object:
    """Batches of which some hold a number that spoils loss and gradient."""

    def batches(first: int) -> Iterator[NumberBatch]:
        for number, batch in enumerate(number_batches(first), start=first):
            rows = batch.rows * value if number in numbers else batch.rows
            yield replace(batch, rows=rows)

    return batches


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_recorded(
    tmp_path: Path, value: float
) -> None:
    folder = open_run_folder(str(tmp_path))
    uploads = Uploads()
    journal = Journal(folder, uploads, 0, time.monotonic)
    state = small_state(EmaSettings())
    seen: list[dict[str, list[float]]] = []

    def objective(model: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
        seen.append(weights(state))
        return line_objective(model, batch, generator)

    settings = LoopSettings(steps=4, log_every=2)
    job = small_job(state, settings, batches=poisoned({1}, value), objective=objective)
    end = train(job, replace(surroundings(), journal=journal), Position())
    journal.close()
    assert (end.bad_steps, end.bad_in_a_row, end.pictures) == (1, 0, 12)
    assert seen[0] != seen[1]
    assert seen[1] == seen[2]
    assert seen[2] != seen[3]
    bad = next(line for line in read_metrics(folder) if line["kind"] == "bad_step")
    assert bad["step"] == 2
    assert bad["losses"] == ["nan"]
    assert bad["keys"] == [["b1p0", "b1p1", "b1p2"]]
    trained = [line for line in read_metrics(folder) if line["kind"] == "train"]
    assert [line["bad_steps"] for line in trained] == [1, 1]
    assert all(isinstance(line["loss"], float) for line in trained)


def test_too_many_bad_steps_in_a_row_end_the_run_naming_step_and_pictures() -> None:
    kept = KeptCheckpoints()
    settings = LoopSettings(steps=9, max_bad_steps=2, checkpoint_every_steps=1)
    batches = poisoned({1, 3, 4}, float("nan"))
    state = small_state()
    with pytest.raises(NonFiniteLoss) as caught:
        train(small_job(state, settings, batches=batches), surroundings(kept), Position())
    assert str(caught.value) == (
        "step 5: 2 updates in a row were not finite, loss nan, gradient norm nan, pictures b4p0, "
        "b4p1, b4p2; the last checkpoint is good: start a new run from it with init=RUN and a "
        "lower optimiser.lr, or loop.precision=float32"
    )
    assert [step for step, _ in kept.saved] == [1, 2, 3, 4]
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


def test_a_gradient_that_is_not_finite_counts_although_the_loss_is() -> None:
    def objective(model: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
        # The slope of the square root at zero is infinite.
        return Losses((model(batch.rows) * 0).sum().sqrt(), {})

    state = small_state()
    before = weights(state)
    settings = LoopSettings(steps=1, max_bad_steps=5)
    end = train(small_job(state, settings, objective=objective), surroundings(), Position())
    assert end.bad_in_a_row == 1
    assert weights(state) == before


def test_bf16_computes_the_model_in_bfloat16_and_keeps_float32_weights() -> None:
    seen: list[torch.dtype] = []

    def objective(model: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
        found = model(batch.rows)
        seen.append(found.dtype)
        return Losses((found.float() ** 2).mean(), {})

    state = small_state()
    settings = LoopSettings(steps=2, precision="bf16")
    train(small_job(state, settings, objective=objective), surroundings(), Position())
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}


def test_a_step_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these would wait for a GPU; one per step, and one for the record at the end."""
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(
            self: Tensor, *rest: object, name: str = name, original: object = original
        ) -> object:
            reads.append(name)
            return original(self, *rest)

        monkeypatch.setattr(torch.Tensor, name, counted)
    settings = LoopSettings(steps=6, log_every=100, accumulate=2)
    train(small_job(small_state(EmaSettings()), settings), surroundings(), Position())
    assert reads == ["tolist"] * 7


def test_a_stream_that_ends_is_an_error() -> None:
    job = replace(small_job(small_state(), LoopSettings(steps=3)), batches=iter([number_batch(0)]))
    with pytest.raises(ValueError, match="the stream of batches ended"):
        train(job, surroundings(), Position())


def test_loss_terms_that_change_are_an_error() -> None:
    def objective(model: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
        total: Tensor = model(batch.rows).sum()
        return Losses(total, {batch.keys[0]: total})

    with pytest.raises(ValueError, match=r"the loss terms changed from .*'b0p0'.* to .*'b1p0'"):
        train(
            small_job(small_state(), LoopSettings(steps=3), objective=objective),
            surroundings(),
            Position(),
        )


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (LoopSettings(steps=7), 7),
        (LoopSettings(epochs=3), 30),
        (LoopSettings(epochs=0.25), 3),
        (LoopSettings(epochs=3, accumulate=4), 8),
        (LoopSettings(epochs=2, accumulate=3), 7),
    ],
)
def test_a_length_in_epochs_is_rounded_up_to_whole_updates(
    settings: LoopSettings, steps: int
) -> None:
    assert plan_steps(settings, batches_per_epoch=10).total_steps == steps


@pytest.mark.parametrize("values", [{}, {"epochs": 2.0, "steps": 3}])
def test_the_length_is_given_once(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give exactly one of them"):
        LoopSettings(**values)


def test_data_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batches_per_epoch=0: the data hold no whole batch"):
        plan_steps(LoopSettings(steps=1), 0)


def test_the_loop_learns() -> None:
    """A line through the batches: the loss falls to nearly nothing."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    state = TrainingState(model, build_optimiser(model, None, OptimiserSettings(lr=0.05)), None)
    records: list[StepRecord] = []

    def objective(line: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
        target = batch.rows[:, :2] * 2 - batch.rows[:, 2:]
        return Losses(((line(batch.rows) - target) ** 2).mean(), {})

    settings = LoopSettings(steps=300, log_every=100)
    job = replace(
        small_job(state, settings, objective=objective, clip_norm=None),
        schedule=replace(small_job(state, settings).schedule, drop_steps=(250,)),
    )
    train(job, replace(surroundings(), report=records.append), Position())
    assert records[0].losses["total"] > 0.1
    assert records[-1].losses["total"] < 1e-3


def test_compiled_names_stay(tmp_path: Path) -> None:
    from training.parallel import parallel_model

    model = DropoutLine()
    names = list(model.state_dict())
    assert parallel_model(model, World.alone(CPU), compiled=True) is model
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="2 workers and no process group"):
        parallel_model(DropoutLine(), World(0, 2, CPU), compiled=False)
    assert json.dumps(names)
