"""One background thread that publishes files in order, so that training never waits for a store.

A failed upload is counted and logged, loudly after several in a row; it never ends the run. Waiting
uploads are bounded: when the store is slower than the run, `submit` waits, so memory is bounded
too.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger(__name__)


class Uploads:
    """First in, first out; one at a time."""

    failures: int
    """Uploads that failed since the start."""
    failures_in_a_row: int
    """The same, since the last that succeeded; above 0 after a flush, the newest is not stored."""

    def __init__(self, max_waiting: int = 2, loud_after: int = 3) -> None:
        self.failures = 0
        self.failures_in_a_row = 0
        self._max_waiting = max_waiting
        self._loud_after = loud_after
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uploads")
        self._pending: deque[Future[None]] = deque()

    def submit(self, what: str, action: Callable[[], None]) -> None:
        """Queues `action`; returns at once unless too many are waiting already."""
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if len(self._pending) > self._max_waiting:
            logger.warning(
                "%d uploads are waiting: the run waits for the store", len(self._pending)
            )
            self._pending.popleft().result()
        done = self._thread.submit(action)
        # Counted by the same thread right after: a callback might run later than a flush.
        self._pending.append(self._thread.submit(self._count, what, done))

    def flush(self) -> None:
        """Returns when everything queued so far has succeeded or failed."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Flushes and ends the thread."""
        self.flush()
        self._thread.shutdown()

    def _count(self, what: str, done: "Future[None]") -> None:
        error = done.exception()
        if error is None:
            self.failures_in_a_row = 0
            return
        self.failures_in_a_row += 1
        self.failures += 1
        is_loud = self.failures_in_a_row >= self._loud_after
        logger.log(
            logging.ERROR if is_loud else logging.WARNING,
            "%s was not stored (%d in a row, %d in all), the run goes on: %s: %s",
            what,
            self.failures_in_a_row,
            self.failures,
            type(error).__name__,
            error,
        )
