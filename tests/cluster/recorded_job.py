"""`querypatch pretrain`, `finetune` or `resume` through Ray; workers note what they were given.

    python -m tests.cluster.recorded_job NOTES pretrain|finetune|resume ARGUMENT...

Each worker appends a line per step to a file of its own in NOTES/START: the step, the sample ids of
its part, a hash of its pixels, and its process. Checkpoints are stored slowly, so that a kill can
hit one.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster.launch
import querypatch

NOTES = Path(sys.argv[1]).absolute() / str(time.time_ns())


def noted(config: dict[str, Any]) -> None:
    """What Ray runs on every worker."""
    import hashlib
    import os

    import finetune.detection
    import pretrain.run
    from cluster.worker import run_on_ray
    from training.run_folder import RunFolder

    put, on_device = RunFolder.put, pretrain.run.on_device
    boxes_to_device = finetune.detection.detection_to_device

    def slow_put(self: RunFolder, source: Path, name: str) -> None:
        put(self, source, name)
        time.sleep(0.3 if name.startswith("checkpoints/") else 0)

    def note(step: int, batch: Any, pixels: Any) -> None:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        line = {"step": step, "ids": batch.sample_ids.tolist(), "pixels": digest}
        line["pid"] = os.getpid()
        with (NOTES / f"{rank}.jsonl").open("a") as notes:
            notes.write(json.dumps(line) + "\n")

    def noting(batches: Iterator[Any], device: Any) -> Iterator[Any]:
        for packed in batches:
            (batch,) = on_device(iter([packed]), device)
            note(packed.step, batch, packed.buffer)
            yield batch

    def noting_boxes(packed: Any, device: Any) -> Any:
        batch = boxes_to_device(packed, device)
        note(packed.step, batch, batch.images.pixels)
        return batch

    RunFolder.put = slow_put  # type: ignore[method-assign]
    pretrain.run.on_device = noting
    finetune.detection.detection_to_device = noting_boxes
    run_on_ray(config)


if __name__ == "__main__":
    NOTES.mkdir(parents=True, exist_ok=True)
    # By value: the workers have no module `__main__` of this kind to import it from.
    cluster.launch.run_on_ray = noted
    sys.argv = ["querypatch", *sys.argv[2:]]
    querypatch.main()
