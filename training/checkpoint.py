"""Checkpoints in two phases: the files, and last the manifest without which they do not exist.

`checkpoints/step_000123/` holds model.safetensors, state.pt (optimiser, moving average, position,
world size) and manifest.json (format, sizes, sha256). Loading checks the hashes and falls back to
the previous whole checkpoint, saying so. The training thread pays one copy to the CPU; files,
hashes and uploads are made in the background.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from training.kept import find_kept, forget_kept, kept_folder
from training.manifest import FileRecord, Manifest, checkpoint_name, is_cut, parse_manifest
from training.retention import RetentionSettings, expired
from training.run_folder import RunFolder
from training.snapshot import (
    MODEL,
    STATE,
    CheckpointError,
    Position,
    Snapshot,
    TrainingState,
    read_files,
    restore,
    write_files,
)
from training.world import World, broadcast_object

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
MANIFEST = "manifest.json"


def save_checkpoint(
    folder: RunFolder,
    snapshot: Snapshot,
    metrics: Mapping[str, float],
    recipe_digest: str,
) -> Manifest:
    """Stores a snapshot: files first, manifest last; replaces a checkpoint of the same step.

    Raises:
        StoreError: the store failed for good; the checkpoint does not exist then.
    """
    with folder.spool() as spool:
        write_files(snapshot, spool)
        manifest = manifest_of(spool, snapshot.position.step, metrics, recipe_digest)
        return commit_files(folder, spool, manifest)


def commit_files(
    folder: RunFolder,
    source: Path,
    manifest: Manifest,
    may_write: Callable[[], None] = lambda: None,
) -> Manifest:
    """Publishes the files of a manifest from `source`, and last the manifest.

    On a local run the files are moved out of `source`. `may_write` is asked before the first and
    before the last, and what it raises goes through.

    Raises:
        StoreError: the store failed for good; the checkpoint does not exist then.
    """
    step = manifest.step
    may_write()
    # Asked first: a store that allows no deletes shall not refuse a new checkpoint for it.
    if folder.size(_place(step, MANIFEST)) is not None:
        folder.delete(_place(step, MANIFEST))
    for name in manifest.files:
        folder.put(source / name, _place(step, name))
    may_write()
    folder.write(_place(step, MANIFEST), manifest.model_dump_json(indent=1).encode())
    return manifest


def manifest_of(
    source: Path, step: int, metrics: Mapping[str, float], recipe_digest: str
) -> Manifest:
    """The manifest of the files that `write_files` made in `source`."""
    return Manifest(
        step=step,
        files={name: _measured(source / name) for name in (MODEL, STATE)},
        # JSON has no NaN, which e.g. the precision of no boxes is.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        recipe_digest=recipe_digest,
    )


def list_checkpoints(folder: RunFolder) -> tuple[Manifest, ...]:
    """The checkpoints that have a manifest and files of its sizes, newest first.

    A folder without a manifest is half-written and passes unmentioned; whatever else is wrong is
    logged as a warning.
    """
    found: list[Manifest] = []
    for step in sorted(_steps(folder), reverse=True):
        try:
            manifest = read_manifest(folder, step)
            found += [_with_right_sizes(folder, manifest)] if manifest else []
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    return tuple(found)


def newest_checkpoint(folder: RunFolder) -> Manifest | None:
    """The newest checkpoint that looks whole by its sizes; its files are not read."""
    return next(iter(list_checkpoints(folder)), None)


def read_manifest(folder: RunFolder, step: int) -> Manifest | None:
    """What a checkpoint's manifest says; None where there is no manifest.

    Raises:
        CheckpointError: the manifest is cut, not one of ours, or of a newer format.
    """
    place = _place(step, MANIFEST)
    try:
        return parse_manifest(folder.read(place))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{folder.url}/{place} is not a manifest of ours: {error}") from error


def load_newest(folder: RunFolder) -> Snapshot | None:
    """The newest checkpoint whose hashes are right; None where the run has none at all.

    Each one that is passed over is logged as a warning that names what was wrong. A cut manifest in
    the only checkpoint is that of a run killed while it stored its first one: it has none yet.

    Raises:
        CheckpointError: there are checkpoints with a manifest, and not one of them is whole.
    """
    for manifest in list_checkpoints(folder):
        try:
            return load_checkpoint(folder, manifest)
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    steps = _steps(folder)
    broken = [step for step in steps if folder.size(_place(step, MANIFEST)) is not None]
    if len(steps) == 1 and broken and is_cut(folder.read(_place(broken[0], MANIFEST))):
        logger.warning("%s: the first checkpoint was never finished; from the start", folder.url)
        return None
    if broken:
        raise CheckpointError(
            f"{folder.url}/{FOLDER}: none of the {len(broken)} checkpoints is whole, see the "
            f"warnings above; delete {FOLDER} to start afresh"
        )
    return None


def load_checkpoint(folder: RunFolder, manifest: Manifest) -> Snapshot:
    """One checkpoint, each file held to its sha256.

    Raises:
        CheckpointError: a file is missing, was changed, or is not one of ours.
    """
    with folder.spool() as spool:
        model = _verified(folder, manifest, MODEL, spool)
        state = _verified(folder, manifest, STATE, spool)
        return read_files(model, state, f"{folder.url}/{FOLDER}/{manifest.name}")


def resume(folder: RunFolder, state: TrainingState, world: World) -> Position:
    """Continues from the newest whole checkpoint, the same one on every worker.

    Returns the very start where the run has no checkpoint. Called on every worker.

    Raises:
        CheckpointError: as `load_newest` and `restore`.
    """
    if world.is_first:
        store_kept(folder)
    snapshot = load_newest(folder) if world.is_first else None
    step = broadcast_object(snapshot.position.step if snapshot else None, world)
    if step is None:
        return Position()
    if snapshot is None:
        snapshot = _load_step(folder, step)
    if snapshot.world_size != world.size:
        logger.info("the run had %d workers and has %d now", snapshot.world_size, world.size)
    return restore(state, snapshot, f"{folder.url}/{FOLDER}/{checkpoint_name(step)}")


def store_kept(folder: RunFolder) -> None:
    """Stores the checkpoint that an earlier start had to leave on this machine, if it goes on.

    Raises:
        StoreError: the store still does not take it; it stays here.
    """
    kept = find_kept(folder)
    if kept is None:
        return
    place = kept_folder(folder)
    newest = newest_checkpoint(folder)
    if newest is None or kept.after != newest.files[MODEL].sha256:
        logger.warning(
            "%s: step %d lies in %s, which the store did not take then; the run went another way "
            "since, so it stays there",
            folder.url,
            kept.manifest.step,
            place,
        )
        return
    commit_kept(folder)


def commit_kept(folder: RunFolder, may_write: Callable[[], None] = lambda: None) -> None:
    """Stores the checkpoint that is kept on this machine; nothing where there is none.

    `may_write` as in `commit_files`.

    Raises:
        StoreError: the store does not take it; it stays here.
    """
    kept = find_kept(folder)
    if kept is None:
        return
    commit_files(folder, kept_folder(folder), kept.manifest, may_write)
    forget_kept(folder)
    logger.info("%s: step %d, kept on this machine, is stored", folder.url, kept.manifest.step)


def delete_expired(folder: RunFolder, settings: RetentionSettings) -> None:
    """Deletes what no rule keeps, manifests first, and older half-written remains.

    The newest whole checkpoint always stays. Only for the one process that writes to the run.
    """
    whole = list_checkpoints(folder)
    if not whole:
        return
    gone = {manifest.step for manifest in expired(whole, settings)}
    kept = {manifest.step for manifest in whole} - gone
    for step in _steps(folder):
        if step < whole[0].step and step not in kept:
            _delete(folder, step)


def _load_step(folder: RunFolder, step: int) -> Snapshot:
    manifest = read_manifest(folder, step)
    if manifest is None:
        raise CheckpointError(f"{folder.url}/{_place(step, MANIFEST)} vanished; start again")
    return load_checkpoint(folder, manifest)


def _place(step: int, name: str) -> str:
    return f"{FOLDER}/{checkpoint_name(step)}/{name}"


def _steps(folder: RunFolder) -> list[int]:
    numbers = [name.removeprefix("step_") for name in folder.names(FOLDER)]
    return [int(number) for number in numbers if number.isdecimal()]


def _measured(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(size=path.stat().st_size, sha256=digest)


def _with_right_sizes(folder: RunFolder, manifest: Manifest) -> Manifest:
    for name, record in manifest.files.items():
        stored = folder.size(_place(manifest.step, name))
        if stored != record.size:
            has = "is missing" if stored is None else f"has {stored} of {record.size} bytes"
            raise CheckpointError(f"{folder.url}/{_place(manifest.step, name)} {has}")
    return manifest


def _verified(folder: RunFolder, manifest: Manifest, name: str, spool: Path) -> Path:
    place = _place(manifest.step, name)
    try:
        path = folder.fetch(place, spool)
        measured = _measured(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder.url}/{place} is missing") from error
    if measured != manifest.files.get(name):
        raise CheckpointError(f"{folder.url}/{place} is not what its manifest says: sha256 differs")
    return path


def _delete(folder: RunFolder, step: int) -> None:
    for name in (MANIFEST, MODEL, STATE):
        folder.delete(_place(step, name))
    folder.delete_folder(f"{FOLDER}/{checkpoint_name(step)}")
