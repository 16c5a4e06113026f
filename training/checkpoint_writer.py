"""Checkpoints of a run that goes on: made in the background, never at the expense of training.

At most two wait while another is on its way: where the store is slower than the run, a newer one
takes the place of one that waits. One that the store does not take is kept on this machine, and
stored at the end of the run, or by the next start here.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock

from models.urls import public_url
from training.checkpoint import (
    commit_files,
    commit_kept,
    delete_expired,
    manifest_of,
    newest_checkpoint,
)
from training.kept import Kept, forget_kept, keep, kept_folder
from training.manifest import Manifest, checkpoint_name
from training.retention import RetentionSettings
from training.run_folder import RunFolder, StoreError
from training.snapshot import MODEL, Position, Snapshot, TrainingState, take_snapshot, write_files
from training.uploads import Uploads
from training.world import World

logger = logging.getLogger(__name__)

RETRY_S = 10.0
"""Seconds between two attempts to store the last checkpoint of a run."""


MAX_WAITING = 2
"""Checkpoints in memory that wait while another one is on its way."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    snapshot: Snapshot
    metrics: dict[str, float]
    is_wanted: bool
    """Whether a newer one is no substitute for it."""


class CheckpointWriter:
    """Stores checkpoints in the background and deletes those that the settings no longer keep."""

    overtaken: int
    """Checkpoints that were never stored since a newer one took their place."""

    def __init__(
        self,
        folder: RunFolder,
        uploads: Uploads,
        settings: RetentionSettings,
        world: World,
        recipe_digest: str,
    ) -> None:
        self.overtaken = 0
        self._folder = folder
        self._uploads = uploads
        self._settings = settings
        self._world = world
        self._recipe_digest = recipe_digest
        self._waiting: deque[_Waiting] = deque()
        self._lock = Lock()
        self._before: str | None = None
        self._unstored: int | None = None
        self._is_kept = False

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        """Copies the state to the CPU and queues it; `metrics` are of an evaluation at this step.

        Called on every worker; all but the first return at once. Raises LeaseLost as `submit`.
        """
        if not self._world.is_first:
            return
        self._uploads.check_lease()
        every = self._settings.keep_every_steps
        is_wanted = bool(metrics) or (every is not None and position.step % every == 0)
        made_room = self._makes_room(position.step)
        snapshot = take_snapshot(state, position, self._world.size)
        with self._lock:
            self._waiting.append(_Waiting(snapshot, dict(metrics), is_wanted))
        if not made_room:
            self._uploads.submit("a checkpoint", self._store_next, asks_itself=True)

    def flush(self) -> None:
        """Returns when every queued checkpoint is stored or has failed."""
        self._uploads.flush()

    def finish(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Returns when the last checkpoint is stored; waits for the store as the settings say.

        Raises:
            StoreError: it is not; where it lies on this machine, the message says so.
            LeaseLost: the run has another writer.
        """
        self._uploads.flush()
        end = clock() + 60 * self._settings.wait_for_store_minutes
        while self._unstored is not None and self._is_kept and clock() < end:
            self._uploads.submit("the last checkpoint", self._store_kept, asks_itself=True)
            self._uploads.flush()
            if self._unstored is not None:
                sleep(RETRY_S)
        self._uploads.check_lease()
        if self._unstored is None:
            return
        url = public_url(self._folder.url)
        where = f", which lies in {kept_folder(self._folder)}" if self._is_kept else ""
        here = " on this machine, which stores it first" if self._is_kept else ""
        raise StoreError(
            f"{url}: the checkpoint of step {self._unstored} was not stored{where}; see the "
            f"warnings above, and once the store takes it, `querypatch resume {url}`{here}"
        )

    def _makes_room(self, step: int) -> bool:
        """Leaves less than MAX_WAITING waiting; True where one was dropped, whose turn is free."""
        with self._lock:
            if len(self._waiting) < MAX_WAITING:
                return False
            passed = next((one for one in reversed(self._waiting) if not one.is_wanted), None)
            if passed is not None:
                self._waiting.remove(passed)
        if passed is None:
            logger.warning("%d checkpoints to keep are waiting: so does the run", MAX_WAITING)
            self._uploads.flush()
            return False
        self.overtaken += 1
        logger.warning(
            "the store is slower than the run: %s, which waited, makes room for %s",
            checkpoint_name(passed.snapshot.position.step),
            checkpoint_name(step),
        )
        return True

    def _store_next(self) -> None:
        with self._lock:
            waiting = self._waiting.popleft()
        self._unstored, self._is_kept = waiting.snapshot.position.step, False
        if self._before is None:
            self._before = self._newest_stored()
        manifest = self._store(waiting)
        self._before, self._unstored = manifest.files[MODEL].sha256, None
        forget_kept(self._folder)
        self._delete_expired()

    def _store(self, waiting: _Waiting) -> Manifest:
        step = waiting.snapshot.position.step
        with self._folder.spool() as spool:
            write_files(waiting.snapshot, spool)
            manifest = manifest_of(spool, step, waiting.metrics, self._recipe_digest)
            try:
                return commit_files(self._folder, spool, manifest, self._uploads.ask_lease)
            except StoreError:
                if not self._folder.is_local:
                    place = keep(self._folder, spool, Kept(manifest=manifest, after=self._before))
                    self._is_kept = True
                    logger.warning("step %d is kept in %s until the store takes one", step, place)
                raise

    def _store_kept(self) -> None:
        commit_kept(self._folder, self._uploads.ask_lease)
        self._unstored = None
        self._delete_expired()

    def _newest_stored(self) -> str | None:
        """As in `Kept.after`."""
        try:
            newest = newest_checkpoint(self._folder)
        except StoreError:
            return None
        return newest.files[MODEL].sha256 if newest else None

    def _delete_expired(self) -> None:
        try:
            delete_expired(self._folder, self._settings)
        except StoreError as error:
            # The new one is stored all the same: this must not count as a failed upload.
            logger.warning("older checkpoints stay: %s", error)
