"""The newest checkpoint that a store did not take, kept on this machine until it does.

It lies in the folder for temporary files, by the run's URL, for this user alone. The next start on
the same machine stores it first, if nothing else became of the run in between: that is known by the
checkpoint that was the store's newest when this one was made.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from models.settings import Settings
from training.manifest import Manifest
from training.run_folder import RunFolder

logger = logging.getLogger(__name__)

NOTE = "kept.json"


class Kept(Settings):
    """What is kept, written last."""

    manifest: Manifest
    after: str | None
    """sha256 of the weights of the checkpoint before it in the store; null where there was none, or
    that is not known."""


def kept_folder(folder: RunFolder) -> Path:
    """Where on this machine a checkpoint of this run is kept: in TMPDIR."""
    run = hashlib.sha256(folder.url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"querypatch-kept-{os.getuid()}-{run}"


def keep(folder: RunFolder, source: Path, kept: Kept) -> Path:
    """Moves a checkpoint's files here, in the place of an older one; returns where they lie.

    Raises:
        OSError: this disk is full or faulty.
    """
    target = kept_folder(folder)
    forget_kept(folder)
    target.mkdir(mode=0o700)
    for name in kept.manifest.files:
        shutil.move(source / name, target / name)
    (target / NOTE).write_text(kept.model_dump_json(indent=1), encoding="utf-8")
    return target


def find_kept(folder: RunFolder) -> Kept | None:
    """What is kept of this run here; None where there is nothing, or what another user put there.

    Files that are not those of its manifest count as nothing.
    """
    place = kept_folder(folder)
    try:
        if place.stat().st_uid != os.getuid():
            return None
        kept = Kept.model_validate_json((place / NOTE).read_bytes())
    except (OSError, ValidationError):
        return None
    sizes = {name: record.size for name, record in kept.manifest.files.items()}
    found = {path.name: path.stat().st_size for path in place.iterdir() if path.name != NOTE}
    return kept if found == sizes else None


def forget_kept(folder: RunFolder) -> None:
    """Removes what is kept of this run here."""
    shutil.rmtree(kept_folder(folder), ignore_errors=True)
