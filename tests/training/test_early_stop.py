"""When a run stops early and which evaluation was its best."""

import math

import pytest

from training.early_stop import EarlyStopSettings, best_step, stopped_at

PATIENT = EarlyStopSettings(patience=2)


def test_a_run_stops_after_as_many_evaluations_without_a_new_best_as_it_has_patience() -> None:
    history = [(0, 0.0), (10, 0.3), (20, 0.5), (30, 0.4), (40, 0.5), (50, 0.9)]
    assert stopped_at(history, PATIENT) == 40
    assert stopped_at(history[:4], PATIENT) is None
    assert best_step(history[:5]) == 20


def test_the_evaluation_before_training_can_never_be_the_best() -> None:
    """Peers' bug 3: a good start (weights that were finetuned before) became "best"."""
    history = [(0, 0.9), (10, 0.2), (20, 0.3)]
    assert best_step(history) == 20
    assert best_step(history[:1]) is None
    assert stopped_at(history, PATIENT) is None


def test_no_patience_is_spent_on_the_evaluation_before_training() -> None:
    history = [(0, 0.9), (10, 0.2), (20, 0.1)]
    assert stopped_at(history, PATIENT) is None
    assert stopped_at([*history, (30, 0.1)], PATIENT) == 30


def test_progress_is_counted_from_the_best_evaluation_and_has_to_exceed_min_delta() -> None:
    """Small steps add up: 0.34 is no progress on 0.30, 0.38 is."""
    history = [(10, 0.30), (20, 0.34), (30, 0.38), (40, 0.39)]
    assert stopped_at(history, EarlyStopSettings(patience=1)) is None
    assert stopped_at(history, EarlyStopSettings(patience=1, min_delta=0.05)) == 20
    assert stopped_at(history, EarlyStopSettings(patience=2, min_delta=0.05)) is None
    assert stopped_at(history, EarlyStopSettings(patience=2, min_delta=0.1)) == 30


def test_a_metric_that_is_not_a_number_is_no_progress_and_never_the_best() -> None:
    history = [(10, math.nan), (20, 0.1), (30, math.nan), (40, math.nan)]
    assert best_step(history) == 20
    assert best_step(history[:1]) is None
    assert stopped_at(history, PATIENT) == 40
    assert stopped_at(history[:3], PATIENT) is None


def test_the_earliest_of_equal_evaluations_is_the_best() -> None:
    assert best_step([(10, 0.1), (20, 0.7), (30, 0.7)]) == 20


def test_an_empty_history_neither_stops_nor_has_a_best() -> None:
    assert stopped_at([], PATIENT) is None
    assert best_step([]) is None


@pytest.mark.parametrize("setting", [{"patience": 0}, {"patience": 2, "min_delta": -0.1}])
def test_settings_that_mean_nothing_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="greater than or equal to"):
        EarlyStopSettings.model_validate(setting)
