"""May the run write to its folder? Found out by doing it: write, read back, list, delete.

The probe is a small file in a folder of its own, which is gone afterwards. A store may allow one
word and refuse another (without `s3:DeleteObject` old checkpoints pile up until the bill comes),
and some ignore the condition of a conditional write, on which the lease of a run stands.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from cluster.preflight.checks import KNOWN, Check, one_line, within
from models.urls import public_url
from training.record import read_recipe_values
from training.run_folder import Patience, RunFolder, StoreError, open_run_folder

NAME = "run folder"
QUICK = Patience(attempts=2, backoff_s=0.5)
"""A job is patient with its store; whoever waits for a check is not."""
ANSWER_S = 20.0
"""Seconds within which a store has to answer a small request."""

_PROBE_BYTES = 64 * 1024


def store_checks(url: str) -> Iterator[Check]:
    """What the run may do in its folder, and whether that is free for a new run.

    Raises ValueError for a URL that cannot be opened, NoAnswerError where nobody answers.
    """
    folder = open_run_folder(url, patience=QUICK)
    # Where reading is refused, the trial of it says so.
    with suppress(StoreError):
        yield within(ANSWER_S, public_url(folder.url), lambda: _empty(folder))
    yield from _rights(folder)


def probe_name() -> str:
    """A name for what is tried out in a run's folder, taken by nobody."""
    return f".preflight-{uuid4().hex[:8]}"


def remove_probe(folder: RunFolder, name: str) -> None:
    """Takes away all that was tried out under a name of `probe_name`."""
    path = folder.path(name)
    if folder.is_local:
        shutil.rmtree(path, ignore_errors=True)
        # A folder that the run will make takes itself away again.
        with suppress(OSError):
            Path(folder.root).rmdir()
    elif folder.filesystem.exists(path):
        folder.filesystem.rm(path, recursive=True)


def _empty(folder: RunFolder) -> Check:
    if read_recipe_values(folder) is None:
        return Check(NAME, "well", f"{public_url(folder.url)} holds no run yet")
    shown = public_url(folder.url)
    return Check(
        NAME,
        "fault",
        f"run={shown} holds a run already; continue it with `querypatch resume {shown}`, or give "
        "another run=",
    )


def _rights(folder: RunFolder) -> Iterator[Check]:
    """One check where all is allowed, else one for each word that is not."""
    place, began = probe_name(), time.monotonic()
    faults = {word: problem for word, problem in _tried_words(folder, place) if problem is not None}
    yield from (Check(f"{NAME}: {word}", "fault", said) for word, said in faults.items())
    if not faults:
        seconds = time.monotonic() - began
        said = f"write, read, list and delete are allowed ({seconds:.1f} s for all)"
        yield Check(f"{NAME}: rights", "well", said, {"seconds": seconds})
        yield _conditional(folder, place)
    if "write" not in faults:
        with suppress(*KNOWN):
            within(ANSWER_S, public_url(folder.url), lambda: remove_probe(folder, place))


def _tried_words(folder: RunFolder, place: str) -> Iterator[tuple[str, str | None]]:
    """What is wrong with each word; where writing is refused the others have nothing to try."""
    data, name = os.urandom(_PROBE_BYTES), f"{place}/probe"
    wrong = _problem(folder, lambda: folder.write(name, data))
    yield "write", wrong
    if wrong is None:
        yield "read", _problem(folder, lambda: _read_back(folder, name, data))
        yield "list", _problem(folder, lambda: _listed(folder, place))
        yield "delete", _problem(folder, lambda: _deleted(folder, name))


def _problem(folder: RunFolder, act: Callable[[], str | None]) -> str | None:
    try:
        return within(ANSWER_S, public_url(folder.url), act)
    except KNOWN as error:
        said = one_line(error)
    way_out = "check the URL, storage.options and the credentials"
    return said if "check" in said or said.endswith("?") else f"{said}; {way_out}"


def _read_back(folder: RunFolder, name: str, data: bytes) -> str | None:
    back = folder.read(name)
    if back == data:
        return None
    return (
        f"{public_url(folder.url)} gave back {len(back)} bytes that are not the {len(data)} that "
        "were written; use another store, or take out the proxy or cache that stands before it"
    )


def _listed(folder: RunFolder, place: str) -> str | None:
    if folder.names(place) == ["probe"]:
        return None
    return (
        f"{public_url(folder.url)} does not list what was just written, so no checkpoint would be "
        "found; allow listing (s3:ListBucket), and use a store whose listings are current"
    )


def _deleted(folder: RunFolder, name: str) -> str | None:
    folder.delete(name)
    if folder.size(name) is None:
        return None
    return (
        f"{public_url(folder.url)} kept {name} that was deleted, so old checkpoints would pile up; "
        "allow deleting (s3:DeleteObject), and no retention lock or versioned delete"
    )


def _conditional(folder: RunFolder, place: str) -> Check:
    """Whether a file that must not exist yet is refused where it does."""
    name, file = f"{NAME}: lease", f"{place}/once"
    kept, reason = False, "the second of two writes that must not overwrite was taken"
    try:
        kept = within(ANSWER_S, public_url(folder.url), lambda: _second_is_refused(folder, file))
    except (NotImplementedError, *KNOWN) as error:
        reason = one_line(error)
    if kept:
        return Check(name, "well", "conditional writes hold: two jobs cannot both take this run")
    return Check(
        name,
        "warning",
        f"no conditional writes here ({reason}): two jobs that start on this run within the same "
        "seconds are told apart by waiting and looking again; start one at a time, or use a store "
        "that knows If-None-Match",
    )


def _second_is_refused(folder: RunFolder, file: str) -> bool:
    folder.create(file, b"first")
    try:
        folder.create(file, b"second")
    except FileExistsError:
        return True
    return False
