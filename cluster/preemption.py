"""When a run writes a checkpoint because a machine has announced its end: a pure plan.

The notice of a spot machine comes 30 s (GCP, Azure) to 120 s (AWS) before the end, and Ray Train
goes on training until then. So one checkpoint is wanted at once, because announced times are not
always kept, and one more shortly before the end, so that the steps in between are not lost.
"""

from dataclasses import dataclass, replace

LAST_BEFORE_S = 15.0
"""How long before the announced end the last checkpoint is wanted: a step and an upload take that
long at most in a small run; `resources.preemption_grace_s` gives the others more."""


@dataclass(frozen=True)
class Notice:
    """The machines of some workers go at `ends_at`, seconds of the epoch; None: not said when."""

    ends_at: float | None
    first_wanted_at: float | None = None
    last_wanted: bool = False


def wanted(notice: Notice, now: float) -> tuple[bool, Notice]:
    """Whether a checkpoint is wanted now, and the notice that remembers it."""
    if notice.first_wanted_at is None:
        return True, replace(notice, first_wanted_at=now)
    if notice.ends_at is None or notice.last_wanted:
        return False, notice
    is_late = now >= notice.ends_at - LAST_BEFORE_S
    is_another = now - notice.first_wanted_at >= LAST_BEFORE_S
    if is_late and is_another:
        return True, replace(notice, last_wanted=True)
    return False, notice
