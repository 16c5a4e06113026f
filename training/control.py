"""Words that reach a run through its folder: `control/stop.json`, "write a checkpoint and end".

Whoever may write to the run's folder can stop it, from any machine and without Ray; the run looks
every few seconds. A file there asks whatever it holds, so that one made by hand does too. A store
that does not answer has asked for nothing.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from training.moments import Now, utc_now
from training.run_folder import Patience, RunFolder, StoreError

logger = logging.getLogger(__name__)

FOLDER = "control"
STOP = "stop.json"

LOOK_EVERY_S = 5.0
"""Seconds between two looks of a run."""


@dataclass(frozen=True)
class StopRequest:
    """Who asked a run to stop, and when."""

    by: str
    """A person, a job or a command, as it called itself."""
    at: str
    """UTC, by the clock of who asked."""


def ask_to_stop(folder: RunFolder, by: str, now: Now = utc_now) -> None:
    """Asks the run to write a checkpoint and end; it does within a step of its next look.

    Raises:
        StoreError: the store refused it.
    """
    content = json.dumps(asdict(StopRequest(by, now())))
    _control(folder).write(STOP, content.encode())


def stop_asked(folder: RunFolder) -> StopRequest | None:
    """The request that lies in the folder; None where there is none or the store is away."""
    try:
        content = replace(_control(folder), patience=Patience(attempts=1)).read(STOP)
    except FileNotFoundError:
        return None
    except StoreError as error:
        logger.warning("whether the run is asked to stop cannot be read: %s", error)
        return None
    return _parsed(content)


def clear_stop(folder: RunFolder) -> None:
    """Takes a request back; called at every start, which an older request does not concern.

    Raises:
        StoreError: the store refused it.
    """
    control = _control(folder)
    control.clear_spool()
    control.delete(STOP)


@contextmanager
def stop_on_request(
    folder: RunFolder, ask: Callable[[StopRequest], None], every_s: float = LOOK_EVERY_S
) -> Iterator[None]:
    """Calls `ask` once, from a thread, when the folder asks the run to stop inside the block."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            request = stop_asked(folder)
            if request is not None:
                ask(request)
                return

    thread = threading.Thread(target=look, name="stop requests", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _control(folder: RunFolder) -> RunFolder:
    """With a spool of its own: the run's writer clears that of the run's folder when it starts."""
    return replace(folder, url=f"{folder.url}/{FOLDER}", root=f"{folder.root}/{FOLDER}")


def _parsed(content: bytes) -> StopRequest:
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    told = values if isinstance(values, dict) else {}
    return StopRequest(by=str(told.get("by", "somebody")), at=str(told.get("at", "")))
