"""Checkpoints of a Ray run: our own two-phase commit, which Ray is told of when it is done.

Ray's default upload loses checkpoints on S3 without an error (measured with Ray 2.60 and pyarrow
19 to 26: after an outage, `report` returned and the last good checkpoint had been deleted). So the
`checkpoint_upload_fn` that Ray gets waits for `training.checkpoint`, which retries, verifies, and
writes the manifest last. What counts as a checkpoint is the manifest, never Ray's own record.
"""

import tempfile
from collections.abc import Mapping

import pyarrow.fs
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from training.checkpoint import FOLDER
from training.checkpoint_writer import CheckpointWriter
from training.manifest import checkpoint_name
from training.run_folder import RunFolder
from training.snapshot import Position, TrainingState
from training.world import World


class RayCheckpoints:
    """A `CheckpointWriter` that tells Ray of each checkpoint; used on every worker."""

    def __init__(self, writer: CheckpointWriter, world: World) -> None:
        self._writer = writer
        self._world = world

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        """Queues the checkpoint and returns; Ray's own thread waits until it is stored.

        A failed upload is counted and logged by the writer; Ray then holds a name without files,
        which nobody reads.
        """
        self._writer.save(state, position, metrics)
        ray.train.report(
            {"step": position.step, "epoch": position.epoch, **metrics},
            # The files are on their way already: what Ray carries is an empty folder.
            checkpoint=Checkpoint(tempfile.mkdtemp()) if self._world.is_first else None,
            checkpoint_dir_name=checkpoint_name(position.step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._when_stored,
        )

    def flush(self) -> None:
        """Returns when everything that was queued is stored or has failed."""
        self._writer.flush()

    def _when_stored(self, _: Checkpoint, name: str) -> Checkpoint:
        self._writer.flush()
        storage = ray.train.get_context().get_storage()
        return Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)


def ray_storage(folder: RunFolder) -> tuple[str, pyarrow.fs.FileSystem]:
    """(storage_path, storage_filesystem) for Ray, so that its experiment can be `checkpoints`."""
    if folder.is_local:
        return folder.root, pyarrow.fs.LocalFileSystem()
    return folder.root, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.filesystem))


def forget_ray_record(folder: RunFolder) -> None:
    """Deletes what Ray recorded of an earlier start, from which it would resume on its own."""
    folder.delete(f"{FOLDER}/checkpoint_manager_snapshot.json")
