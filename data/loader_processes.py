"""Loader processes: started, listened to and ended; for the stream and for evaluation alike.

They are started by a fork server, a process without threads and without a device: a plain fork of a
training process copies locks that threads of Ray, of the storage client or of the device hold at
that moment, and nobody releases them in the copy. The first start imports for some seconds, later
ones take about one (measured on two busy cores).
"""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from threading import Thread
from typing import TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.annotations import AnnotationError
from data.index import ShardIndex
from data.reading import ShardReadError
from data.samples import DamagedShardError
from data.storage import StorageOptions, StorageUnreachable, open_folder

T = TypeVar("T")

MakeParts = Callable[[int, int], Iterator[T]]
"""What process n of m makes; it travels to the processes, so it is a function with its data."""

_PRELOADED = ("torch", "webdataset.tariterators", "data.patch_content", "data.detection_content")
"""What every loader process needs is imported once, in the fork server, and shared by them."""


class StreamError(ValueError):
    """The data are not what they should be, and will not be at a later start either."""


class LoaderDied(RuntimeError):  # noqa: N818
    """A loader process is gone, e.g. for want of memory; a later start may succeed."""


@dataclass(frozen=True)
class LoaderFailure:
    """Why a loader process cannot go on; sent as a value, so that one line arrives."""

    message: str
    may_pass: bool
    """True where a later start may succeed: the storage does not answer."""


def start_loading(
    make: MakeParts[T], processes: int, parts_ahead: int
) -> Iterator[T | LoaderFailure]:
    """What all loader processes make in turn: of the first, the second, ..., the first.

    With `processes=0` it is made in this process. Ask for it with `next_part`, end with
    `stop_loading`.
    """
    parts = _Parts(make)
    if processes == 0:
        return iter(parts)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with warnings.catch_warnings():
        # It counts the cores for one rank; how many processes there are is the recipe's to say.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[T | LoaderFailure] = DataLoader(
            parts,
            batch_size=None,
            num_workers=processes,
            prefetch_factor=parts_ahead,
            multiprocessing_context=context,
            worker_init_fn=_begin_loader_process,
        )
        return iter(loader)


def next_part(iterator: Iterator[T | LoaderFailure]) -> T:
    """The next part; StopIteration where there is none.

    Raises, in one line, StreamError or StorageUnreachable where its loader process cannot go on,
    LoaderDied where that is gone.
    """
    try:
        part = next(iterator)
    except (RuntimeError, EOFError, OSError) as error:
        if not _tells_of_death(error, iterator):
            raise
        raise LoaderDied(
            f"a loader process died ({' '.join(str(error).split()) or type(error).__name__}): out "
            "of memory, or of shared memory (/dev/shm); use a smaller order.block, fewer processes "
            "or parts_ahead, or more memory, then resume"
        ) from error
    if isinstance(part, LoaderFailure):
        raise (StorageUnreachable if part.may_pass else StreamError)(part.message)
    return part


def stop_loading(iterator: Iterator[T | LoaderFailure]) -> None:
    """Ends the loader processes now, not when the last reference to them goes."""
    match iterator:
        case _MultiProcessingDataLoaderIter():
            iterator._shutdown_workers()
        case Generator():
            iterator.close()


def url_for_processes(index: ShardIndex, storage_options: StorageOptions, processes: int) -> str:
    """The index's URL; a local folder by its whole path, since processes may work elsewhere.

    Raises ValueError where loader processes could not see it.
    """
    folder = open_folder(index.url, storage_options)
    if folder.is_local:
        return folder.path or "/"
    if index.url.startswith("memory://") and processes:
        raise ValueError(
            f"{index.url} exists in this process only, so loader processes cannot read it; "
            "use processes=0"
        )
    return index.url


class _Parts(IterableDataset[T | LoaderFailure]):
    """What the process that iterates makes, and last, where its data are wrong, why it ended."""

    def __init__(self, make: MakeParts[T]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T | LoaderFailure]:
        worker = get_worker_info()
        process, processes = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            yield from self._make(process, processes)
        except (ShardReadError, DamagedShardError, AnnotationError) as error:
            yield LoaderFailure(str(error), may_pass=False)
        except StorageUnreachable as error:
            yield LoaderFailure(str(error), may_pass=True)


def _begin_loader_process(_worker: int) -> None:
    """Loader processes are the parallelism; libraries' own threads would only fight over cores.

    Ctrl-C reaches every process of a terminal, and the run still needs batches to its last step:
    the training process alone decides when loader processes end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    Thread(target=_end_with_training, name="end-with-training", daemon=True).start()


def _end_with_training() -> None:
    """Ends this process when the training process is gone, however it went.

    DataLoader watches the parent of its processes, which here is the fork server; and that lives as
    long as one of them does. So after a SIGKILL of the training process all would stay (seen).
    """
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)


def _tells_of_death(error: Exception, iterator: Iterator[T | LoaderFailure]) -> bool:
    """Whether an error of DataLoader means that a process is gone.

    It says so itself, or the part's shared memory could not be had from the process that made it,
    which DataLoader notices only a moment later. An error that a process raised has its traceback.
    """
    if not isinstance(iterator, _MultiProcessingDataLoaderIter):
        return False
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return "Original Traceback" not in str(error)
