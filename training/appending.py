"""Files that grow while a run goes on, on a disk that may be full for a while.

A full disk ends no run: lines wait in memory until there is room again; points of curves are lost,
which the lines still tell.
"""

import logging
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class LineFile:
    """A local file of lines; what the disk does not take is written with the next line."""

    def __init__(self, path: Path) -> None:
        """Opens it at its end. Raises OSError where that cannot be."""
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""

    def add(self, line: str) -> None:
        """Adds a line, which needs no end; never raises for the disk's sake."""
        was_waiting = bool(self._waiting)
        self._waiting += line.encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._handle, self._waiting) :]
        except OSError as error:
            if not was_waiting:
                logger.warning("%s: lines wait in memory, the run goes on: %s", self._path, error)

    def sync(self) -> None:
        """Brings what was taken to the disk, as far as that goes."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            logger.warning("%s: %s", self._path, error)

    def close(self) -> None:
        """Closes it; what the disk still does not take is lost, which is said."""
        if self._waiting:
            self.add("")
        if self._waiting.strip():
            lost = self._waiting.count(b"\n")
            logger.error("%s: the disk did not take the last %d lines", self._path, lost)
        os.close(self._handle)


class Curves:
    """TensorBoard's files in a local folder; a new one is begun where the disk gave up on one."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """What an earlier start recorded from `first_step` on is hidden."""
        self._folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, name: str, value: float | int, step: int) -> None:
        """Adds a point; it is lost while the disk is full."""
        try:
            if self._writer:
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Brings all points to the file; begins a new one where the last was given up."""
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Closes the file."""
        try:
            if self._writer:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("%s: points of curves are lost, the run goes on: %s", self._folder, error)
        self._writer = None
