"""One background thread that publishes files in order, so that training never waits for a store.

A failed upload is counted and logged, loudly after several in a row; it never ends the run. What
ends it is another writer: before each upload the run's lease is asked for, and once it is lost
nothing more is written.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from training.lease import LeaseLost

logger = logging.getLogger(__name__)


class Uploads:
    """First in, first out; one at a time."""

    failures: int
    """Uploads that failed since the start."""
    failures_in_a_row: int
    """The same, since the last that succeeded; above 0 after a flush, the newest is not stored."""

    def __init__(
        self,
        max_waiting: int = 100,
        loud_after: int = 3,
        may_write: Callable[[], None] | None = None,
    ) -> None:
        """`may_write` raises LeaseLost where the run has another writer (`lease.check_held`)."""
        self.failures = 0
        self.failures_in_a_row = 0
        self._max_waiting = max_waiting
        self._loud_after = loud_after
        self._may_write = may_write
        self._lost: LeaseLost | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uploads")
        self._pending: deque[Future[None]] = deque()

    def submit(self, what: str, action: Callable[[], None], asks_itself: bool = False) -> None:
        """Queues `action`; returns at once unless too many are waiting already.

        An action that `asks_itself` calls `ask_lease` before it writes; for others it is called.

        Raises:
            LeaseLost: the run has another writer, as was learned before an earlier upload.
        """
        self.check_lease()
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if len(self._pending) > self._max_waiting:
            logger.warning(
                "%d uploads are waiting: the run waits for the store", len(self._pending)
            )
            self._pending.popleft().result()
        done = self._thread.submit(action if asks_itself else lambda: self._guarded(action))
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

    def check_lease(self) -> None:
        """Raises LeaseLost where an upload found that the run has another writer."""
        if self._lost is not None:
            raise self._lost

    def ask_lease(self) -> None:
        """Returns where the run is still this one's to write to, as the store says now.

        Raises:
            LeaseLost: the run has another writer.
            StoreError: the store cannot be asked.
        """
        self.check_lease()
        if self._may_write:
            self._may_write()

    def _guarded(self, action: Callable[[], None]) -> None:
        self.ask_lease()
        action()

    def _count(self, what: str, done: "Future[None]") -> None:
        error = done.exception()
        if error is None:
            self.failures_in_a_row = 0
            return
        if isinstance(error, LeaseLost):
            self._lost = self._lost or error
            logger.error("%s is not stored: %s", what, error)
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
