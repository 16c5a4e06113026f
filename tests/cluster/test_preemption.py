"""A machine that announces its end: one checkpoint at once, one shortly before."""

import pytest

from cluster.preemption import Notice, wanted


@pytest.mark.parametrize(
    ("ends_at", "expected"),
    [
        (120.0, [0, 105]),
        (30.0, [0, 15]),
        (29.0, [0, 15]),
        (10.0, [0]),
        (None, [0]),
    ],
)
def test_checkpoints_are_wanted_at_the_notice_and_before_the_end(
    ends_at: float | None, expected: list[int]
) -> None:
    notice = Notice(ends_at)
    found: list[int] = []
    for second in range(121 if ends_at is None else int(ends_at) + 1):
        is_wanted, notice = wanted(notice, float(second))
        found += [second] if is_wanted else []
    assert found == expected
