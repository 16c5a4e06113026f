"""When the loop records, evaluates and saves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from models.structures import Losses
from tests.training.small import (
    KeptCheckpoints,
    NumberBatch,
    line_objective,
    number_batches,
    small_job,
    small_state,
    surroundings,
)
from training.ema import EmaSettings
from training.job import LoopSettings, Scoring
from training.loop import train
from training.metrics import StepRecord
from training.snapshot import Position


def test_checkpoints_come_every_so_many_steps_and_at_the_end() -> None:
    kept = KeptCheckpoints()
    settings = LoopSettings(steps=7, checkpoint_every_steps=3, checkpoint_every_minutes=None)
    train(small_job(small_state(), settings), surroundings(kept), Position())
    assert [step for step, _ in kept.saved] == [3, 6, 7]


def test_checkpoints_come_by_the_clock() -> None:
    @dataclass
    class Minutes:
        now: float = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Minutes()

    def batches(first: int) -> Iterator[NumberBatch]:
        for batch in number_batches(first):
            clock.now += 60.0
            yield batch

    kept = KeptCheckpoints()
    settings = LoopSettings(steps=8, checkpoint_every_minutes=2.5)
    around = replace(surroundings(kept), clock=clock)
    # A minute passes in each step, while its batch is fetched.
    train(small_job(small_state(), settings, batches=batches), around, Position())
    assert [step for step, _ in kept.saved] == [3, 6, 8]


def test_asked_to_stop_it_saves_and_returns_without_evaluating() -> None:
    kept = KeptCheckpoints()
    polls = iter(range(1, 9))
    evaluated: list[str] = []

    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        evaluated.append("now")
        return lambda: {"ap": 0.5}

    around = replace(surroundings(kept), stop=lambda: next(polls) == 4, evaluate=evaluate)
    settings = LoopSettings(steps=8, evaluate_every=2)
    end = train(small_job(small_state(), settings), around, Position())
    assert end.step == 4
    assert kept.saved == [(4, {})]
    assert len(evaluated) == 2  # at the start and after step 2


def test_evaluation_uses_the_average_and_its_metrics_go_with_the_checkpoint() -> None:
    state = small_state(EmaSettings())
    kept = KeptCheckpoints()
    models: list[nn.Module] = []

    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        models.append(model)
        assert not model.training
        assert not torch.is_grad_enabled()
        return lambda: {"ap": float(len(models))}

    settings = LoopSettings(steps=5, evaluate_every=2, checkpoint_every_steps=2)
    train(small_job(state, settings), replace(surroundings(kept), evaluate=evaluate), Position())
    assert kept.saved == [(2, {"eval/ap": 2.0}), (4, {"eval/ap": 3.0}), (5, {"eval/ap": 4.0})]
    assert all(model is state.ema.model for model in models)
    assert state.model.training


def test_records_are_means_over_their_window() -> None:
    totals: list[float] = []

    def objective(model: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
        losses = line_objective(model, batch, generator)
        totals.append(losses.total.item())
        return losses

    records: list[StepRecord] = []
    settings = LoopSettings(steps=5, log_every=2)
    around = replace(surroundings(), report=records.append, counters=lambda: {"retries": 3})
    train(small_job(small_state(), settings, objective=objective), around, Position())
    assert [record.step for record in records] == [2, 4, 5]
    expected = [sum(totals[:2]) / 2, sum(totals[2:4]) / 2, totals[4]]
    assert [r.losses["total"] for r in records] == pytest.approx(expected, rel=1e-6)
    assert [r.pictures for r in records] == [6, 12, 15]
    assert [r.epoch for r in records] == pytest.approx([0.4, 0.8, 1.0])
    assert [r.rates["rest"] for r in records] == pytest.approx([0.01, 0.001, 0.001])
    assert records[0].counters == {"retries": 3}
    assert all(0 < r.wait_share < 1 for r in records)
    assert records[-1].seconds_left == 0


def test_skipped_pictures_are_counted_and_named() -> None:
    def batches(first: int) -> Iterator[NumberBatch]:
        for number, batch in enumerate(number_batches(first), start=first):
            yield replace(batch, skipped=("broken",)) if number == 1 else batch

    records: list[StepRecord] = []
    settings = LoopSettings(steps=4, log_every=2)
    around = replace(surroundings(), report=records.append)
    end = train(small_job(small_state(), settings, batches=batches), around, Position())
    assert end.skipped == 1
    assert [(r.skipped, r.skipped_keys) for r in records] == [(1, ("broken",)), (1, ())]


def test_a_checkpoint_comes_for_each_wish() -> None:
    kept = KeptCheckpoints()
    wishes = iter([False, True, False, False, True, True])
    settings = LoopSettings(steps=7, checkpoint_every_minutes=None)
    around = replace(surroundings(kept), checkpoint_wanted=lambda: next(wishes, False))
    train(small_job(small_state(), settings), around, Position())
    assert [step for step, _ in kept.saved] == [2, 5, 6, 7]


def test_every_update_and_every_evaluation_is_a_sign_of_life() -> None:
    heard: list[int] = []

    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        alive()
        return lambda: {"ap": 0.5}

    settings = LoopSettings(steps=4, evaluate_every=2)
    around = replace(surroundings(), beat=heard.append, evaluate=evaluate)
    train(small_job(small_state(), settings), around, Position())
    assert heard == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4]
