"""A worker that makes no progress ends itself, and says where it hung.

A deadlock in a collective, a read that never returns, a stuck driver of a GPU: nothing raises, and
nobody notices for hours. Every step and every batch of an evaluation is a sign of life; after
`limit_s` without one the stacks of all threads go to the log, one line to the run's history, and
the process ends, so that the group starts again from the newest checkpoint. Before the first sign
it may take longer: weights are loaded, a model compiled, the others waited for. Where even Python
stands still (code that keeps its lock), a timer of the interpreter does the same without the line.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

EXIT_STATUS = 70
"""Of a process that ended itself for hanging."""

_STDERR = 2
"""The log of a worker, whatever Python's own streams became."""

BEFORE_FIRST = 4
"""How many times as long the first sign of life may take."""

RESERVE_S = 30.0
"""How much later the interpreter's own timer strikes."""


class Watchdog:
    """Watches the thread that enters its `with` block."""

    def __init__(
        self,
        limit_s: float,
        tell: Callable[[str, int], None],
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tell` is given one line and the last step; then `end` is called."""
        self._limit_s = limit_s
        self._tell = tell
        self._end = end
        self._clock = clock
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._over = threading.Event()
        self._watched = 0
        self._step = 0
        self._allowed_s = limit_s * BEFORE_FIRST
        self._beaten_at = self._armed_at = clock()

    def beat(self, step: int) -> None:
        """A sign of life after `step` updates."""
        is_first, self._allowed_s = self._allowed_s != self._limit_s, self._limit_s
        self._step = step
        self._beaten_at = now = self._clock()
        if is_first or now - self._armed_at >= self._limit_s / 10:
            self._arm(now)

    def __enter__(self) -> Self:
        self._watched = threading.get_ident()
        self._beaten_at = self._clock()
        self._arm(self._beaten_at)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self, now: float) -> None:
        self._armed_at = now
        after_s = self._allowed_s + self._limit_s / 10 + RESERVE_S
        faulthandler.dump_traceback_later(after_s, exit=True, file=_STDERR)

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._limit_s / 10)):
            silent_s = self._clock() - self._beaten_at
            if silent_s >= self._allowed_s:
                self._report(silent_s)
                self._end(EXIT_STATUS)
                return

    def _report(self, silent_s: float) -> None:
        line = (
            f"no progress for {silent_s:.0f} s after step {self._step}, in {self._place()}; the "
            "worker ends (resources.hang_minutes)"
        )
        logger.error("%s; the stacks of all its threads follow", line)
        faulthandler.dump_traceback(file=_STDERR)
        self._tell(line, self._step)

    def _place(self) -> str:
        """Where the watched thread is: the innermost call, and the innermost of our own."""
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return "a thread that is over"
        calls = traceback.extract_stack(frame)
        ours = [call for call in calls if "site-packages" not in call.filename]
        shown = {_shown(call) for call in (calls[-1], *ours[-1:])}
        return " called by ".join(sorted(shown, key=lambda text: text != _shown(calls[-1])))


def _shown(call: traceback.FrameSummary) -> str:
    return f"{call.name} ({os.path.basename(call.filename)}:{call.lineno})"  # noqa: PTH119
