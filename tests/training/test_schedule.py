"""Learning rates by hand."""

import logging

import pytest

from training.schedule import Schedule, ScheduleSettings, learning_rate, schedule_in_steps


def rates(schedule: Schedule, base: float) -> list[float]:
    return [learning_rate(schedule, base, step) for step in range(schedule.total_steps)]


def test_steps_drop_the_rate_at_epochs_turned_to_steps() -> None:
    settings = ScheduleSettings(drop_at=(2, 3.5), drop_factor=0.1)
    schedule = schedule_in_steps(settings, total_steps=10, steps_per_epoch=2.5)
    assert schedule.drop_steps == (5, 9)
    assert rates(schedule, 1.0) == pytest.approx([1.0] * 5 + [0.1] * 4 + [0.01])


def test_the_official_recipe_drops_by_ten_after_epoch_40_of_60() -> None:
    schedule = schedule_in_steps(ScheduleSettings(drop_at=(40,)), 60 * 5004, 5004.0)
    assert learning_rate(schedule, 1e-4, 40 * 5004 - 1) == 1e-4
    assert learning_rate(schedule, 1e-4, 40 * 5004) == pytest.approx(1e-5)


def test_cosine_falls_from_full_to_its_final_share_after_a_linear_rise() -> None:
    settings = ScheduleSettings(kind="cosine", unit="steps", warmup=2, final_share=0.2)
    schedule = schedule_in_steps(settings, total_steps=6, steps_per_epoch=3.0)
    # 0.2 + 0.8 * (1 + cos(pi * k / 4)) / 2 for k = 0..3
    expected = [0.5, 1.0, 1.0, 0.8828427, 0.6, 0.3171573]
    assert rates(schedule, 1.0) == pytest.approx(expected)
    assert learning_rate(schedule, 1.0, 6) == pytest.approx(0.2)


def test_a_drop_beyond_the_end_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        schedule_in_steps(ScheduleSettings(drop_at=(4, 40)), total_steps=10, steps_per_epoch=2.0)
    assert [record.getMessage() for record in caplog.records] == [
        "schedule.drop_at=[40.0] (epochs) lies beyond the last step, 10: the rate never drops there"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drop_at": (3, 2)}, r"drop_at=\[3.0, 2.0\] must be positive and rising"),
        ({"drop_at": (0,)}, r"drop_at=\[0.0\] must be positive and rising"),
        ({"kind": "cosine", "drop_at": (1,)}, r"drop_at=\[1.0\] does nothing with kind=cosine"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleSettings(**values)
