"""Moments as the run's files write them: UTC in ISO 8601, e.g. 2026-11-26T04:25:17.123Z."""

from collections.abc import Callable
from datetime import UTC, datetime

Now = Callable[[], str]
"""Tells the present moment."""


def utc_now() -> str:
    """The present moment by this machine's clock."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from one moment to another; negative where the order is the other one."""
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
