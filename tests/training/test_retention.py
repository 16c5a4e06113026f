"""Which checkpoints stay, and the manifest that tells of them."""

import pytest

from training.manifest import Manifest, parse_manifest
from training.retention import RetentionSettings, expired


def checkpoint(step: int, **metrics: float) -> Manifest:
    return Manifest(step=step, files={}, metrics=metrics)


HISTORY = (
    checkpoint(10, ap=0.1),
    checkpoint(20, ap=0.4),
    checkpoint(30, ap=0.2),
    checkpoint(40),
    checkpoint(50, ap=0.3),
)


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        (RetentionSettings(keep_last=1), [10, 20, 30, 40]),
        (RetentionSettings(keep_last=3), [10, 20]),
        (RetentionSettings(keep_last=9), []),
        (RetentionSettings(keep_last=1, best_metric="ap"), [10, 30, 40]),
        (RetentionSettings(keep_last=1, best_metric="ap", best_is="min"), [20, 30, 40]),
        (RetentionSettings(keep_last=1, best_metric="loss"), [10, 20, 30, 40]),
        (RetentionSettings(keep_last=1, keep_every_steps=20), [10, 30]),
        (RetentionSettings(keep_last=2, keep_every_steps=30, best_metric="ap"), [10]),
    ],
)
def test_what_no_rule_keeps_goes(settings: RetentionSettings, gone: list[int]) -> None:
    assert [manifest.step for manifest in expired(HISTORY[::-1], settings)] == gone


def test_of_equal_checkpoints_the_earlier_is_the_best() -> None:
    history = (checkpoint(1, ap=0.5), checkpoint(2, ap=0.5), checkpoint(3, ap=0.1))
    settings = RetentionSettings(keep_last=1, best_metric="ap")
    assert [manifest.step for manifest in expired(history, settings)] == [2]


def test_the_newest_always_stays() -> None:
    assert expired(HISTORY[:1], RetentionSettings(keep_last=1)) == ()
    assert expired((), RetentionSettings()) == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"format": 1, "ste', "the file: Invalid JSON"),
        (b'{"format": 2, "step": 3, "files": {}}', "format: Input should be 1"),
        (b'{"format": 1, "files": {}}', "step: Field required"),
    ],
)
def test_a_foreign_manifest_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_manifest(data)
    assert "\n" not in str(caught.value)
