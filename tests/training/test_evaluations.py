"""Evaluations: in the background or not, judged, and made again after a kill."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.small import KeptCheckpoints, small_job, small_state, surroundings
from training.job import Evaluated, LoopSettings, Scoring, plan_steps
from training.loop import train
from training.metrics import Journal, read_metrics
from training.run_folder import open_run_folder
from training.snapshot import Position
from training.uploads import Uploads


def line_weights(model: nn.Module) -> list[float]:
    return model.state_dict()["head.bias"].tolist()


def test_training_goes_on_while_an_evaluation_is_scored() -> None:
    is_scored, goes_on = threading.Event(), threading.Event()
    steps: list[int] = []

    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        def score() -> dict[str, float]:
            assert goes_on.wait(10)
            is_scored.set()
            return {"ap": 0.5}

        return score if steps else lambda: {"ap": 0.0}

    def stop() -> bool:
        steps.append(len(steps) + 1)
        if len(steps) == 4:  # two steps after the evaluation that follows step 2
            assert not is_scored.is_set()
            goes_on.set()
        return False

    settings = LoopSettings(steps=5, evaluate_every=2, score_in_background=True)
    judged: list[Evaluated] = []

    def judge(evaluated: Evaluated) -> bool:
        judged.append(evaluated)
        return False

    around = replace(surroundings(), evaluate=evaluate, judge=judge, stop=stop)
    train(small_job(small_state(), settings), around, Position())
    assert [evaluated.step for evaluated in judged] == [0, 2, 4, 5]


def test_what_is_judged_are_the_weights_of_the_evaluation_not_later_ones() -> None:
    seen: dict[int, list[float]] = {}
    state = small_state()
    steps = iter(range(100))

    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        seen[2 * next(steps)] = line_weights(model)
        return lambda: time.sleep(0.05) or {"ap": 1.0}

    judged: dict[int, list[float]] = {}

    def judge(evaluated: Evaluated) -> bool:
        judged[evaluated.step] = evaluated.weights["head.bias"].tolist()
        return False

    settings = LoopSettings(steps=4, evaluate_every=2, score_in_background=True)
    around = replace(surroundings(), evaluate=evaluate, judge=judge)
    train(small_job(state, settings), around, Position())
    assert judged == seen
    assert len({tuple(weights) for weights in judged.values()}) == 3


def test_a_judge_ends_the_run_with_a_checkpoint() -> None:
    kept = KeptCheckpoints()
    around = replace(
        surroundings(kept),
        evaluate=lambda model, alive: lambda: {"ap": 0.1},
        judge=lambda evaluated: evaluated.step >= 4,
    )
    settings = LoopSettings(steps=20, evaluate_every=2)
    end = train(small_job(small_state(), settings), around, Position())
    assert end.step == 5
    assert [step for step, _ in kept.saved] == [5]


def test_an_evaluation_that_a_kill_lost_is_made_again_and_no_other(tmp_path: Path) -> None:
    """Peers' bug 2: what is due at step k is not skipped by resuming at k, nor made at k + 1."""
    folder = open_run_folder(str(tmp_path))
    evaluated: list[str] = []

    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        evaluated.append("now")
        return lambda: {"ap": 0.5}

    def start_at(step: int) -> None:
        uploads = Uploads()
        journal = Journal(folder, uploads, step, time.monotonic)
        settings = LoopSettings(steps=step, evaluate_every=4)
        around = replace(surroundings(), evaluate=evaluate, journal=journal)
        train(small_job(small_state(), settings, Position(step)), around, Position(step))
        journal.close()
        uploads.close()

    start_at(4)
    assert len(evaluated) == 1
    start_at(4)
    assert len(evaluated) == 1
    assert [line["step"] for line in read_metrics(folder) if line["kind"] == "evaluation"] == [4]


def test_a_resumed_run_without_steps_left_ends_quietly() -> None:
    """Peers' bug 4: nothing is undefined where no epoch is left."""
    settings = LoopSettings(steps=3, evaluate_every=2)
    around = replace(surroundings(), evaluate=lambda model, alive: lambda: {"ap": 0.5})
    start = Position(step=3)
    assert train(small_job(small_state(), settings, start), around, start) == start


def test_evaluations_by_epochs_are_evaluations_by_steps() -> None:
    settings = LoopSettings(epochs=6, evaluate_every_epochs=2, accumulate=2)
    assert plan_steps(settings, 7).evaluate_every == 7
    assert plan_steps(LoopSettings(steps=9), 7).evaluate_every is None
    with pytest.raises(ValueError, match="give one of them"):
        LoopSettings(steps=3, evaluate_every=2, evaluate_every_epochs=1.0)


def test_an_error_of_the_scoring_is_not_lost() -> None:
    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        def score() -> dict[str, float]:
            raise ValueError("the predictions of picture 7 are not finite")

        return score

    settings = LoopSettings(steps=3, evaluate_every=2, score_in_background=True)
    around = replace(surroundings(), evaluate=evaluate)
    with pytest.raises(ValueError, match="picture 7"):
        train(small_job(small_state(), settings), around, Position())
    assert torch.is_grad_enabled()
