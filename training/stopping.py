"""Asking a run to stop: a flag that signals set and the loop polls.

The first signal asks; a second one of the same kind does what it always did, so that a hung run
can still be ended from the keyboard.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """False until somebody asks to stop; may be asked from any thread."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __call__(self) -> bool:
        """Whether somebody has asked."""
        return self._asked.is_set()

    def ask(self) -> None:
        """The run writes a checkpoint after its present step and returns."""
        self._asked.set()


@contextmanager
def stop_on_signals(
    flag: StopFlag, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[None]:
    """Lets signals ask for the stop inside the block; for the main thread only."""
    earlier = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        flag.ask()
        signal.signal(number, earlier[signal.Signals(number)])

    for number in signals:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
