"""A small pretraining run on several Ray nodes of this machine, and its history as it grows."""

import json
import os
import subprocess
import time
from pathlib import Path

from cluster.processes import descendants, kill_tree
from data.index import read_index
from data.order import OrderSettings, batch_ids, plan_epoch
from tests.cluster.killing import begin_job, ids_of
from tests.cluster.ray_nodes import RayNode, RayNodes
from tests.pretrain.small_run import RECIPE, small_shards
from training.checkpoint import newest_checkpoint
from training.history import Event, read_history
from training.run_folder import RunFolder, open_run_folder

PICTURES, BATCH, SEED = 10, 3, 42


class Story:
    """A job on the nodes, which notes what its workers are given; in an empty folder."""

    def __init__(self, place: Path, nodes: RayNodes, *overrides: str) -> None:
        small_shards(place, PICTURES)
        (place / "own.yaml").write_text(RECIPE)
        self.place = place
        self.folder: RunFolder = open_run_folder(str(place / "run"))
        self._seen = 0
        self._events: tuple[Event, ...] = ()
        self._nodes = nodes
        told = (
            f"run={place / 'run'}", f"data.shards={place / 'shards'}", "loop.steps=1000000",
            "loop.checkpoint_every_steps=20", "loop.log_every=20", "resources.resize_every_s=3",
            f"seed={SEED}", *overrides,
        )  # fmt: skip
        self.job = self._begin("pretrain", place / "own.yaml", *told)

    def resume(self, *overrides: str) -> None:
        """Goes on with the run in a new job."""
        self.job = self._begin("resume", self.place / "run", *overrides)

    def wait(self, kind: str, workers: int | None = None, timeout_s: float = 120) -> Event:
        """The next event of a kind, after those that were waited for; of so many workers."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._events = read_history(self.folder)
            for number in range(self._seen, len(self._events)):
                if self._events[number].kind == kind:
                    self._seen = number + 1
                    if workers in (None, self._group(number)):
                        return self._events[number]
            over = self.job.poll() is not None and kind not in ("stopped", "finished", "failed")
            assert not over, f"the job ended before {kind}; its log:\n{self._log()}"
            time.sleep(0.2)
        raise AssertionError(f"no {kind} in {timeout_s} s; so far {self._shown()}\n{self._log()}")

    def check_ended(self, status: int, timeout_s: float = 120) -> None:
        """Waits for the job's end and holds it to its exit status."""
        found = self.job.wait(timeout=timeout_s)
        assert found == status, f"the job ended with {found}; its log:\n{self._log()}"

    def wait_stored(self, step: int, timeout_s: float = 60) -> None:
        """Returns when a checkpoint of `step` or later is whole."""
        deadline = time.monotonic() + timeout_s
        while (newest := newest_checkpoint(self.folder)) is None or newest.step < step:
            assert time.monotonic() < deadline, f"no checkpoint of step {step} in {timeout_s} s"
            time.sleep(0.2)

    def __enter__(self) -> "Story":
        return self

    def __exit__(self, *_: object) -> None:
        if self.job.poll() is None:
            kill_tree(self.job.pid)
            self.job.wait()

    def workers(self) -> list[int]:
        """Processes of the training workers of this job's nodes."""
        return [pid for node in self._nodes.nodes for pid in _workers_on(node)]

    def node_of_worker(self, rank: int) -> RayNode:
        """The node that a rank of the present group runs on."""
        newest = max((self.place / "run.notes").glob(f"*/{rank}.jsonl"))
        pid = json.loads(newest.read_text().splitlines()[-2])["pid"]
        return next(node for node in self._nodes.nodes if pid in _workers_on(node))

    def wait_no_workers(self, timeout_s: float, on: RayNode | None = None) -> None:
        """Returns when no training worker of the nodes, or of that one, is left."""
        deadline = time.monotonic() + timeout_s
        nodes = [on] if on else self._nodes.nodes
        while any(_workers_on(node) for node in nodes):
            assert time.monotonic() < deadline, f"workers are left after {timeout_s} s"
            time.sleep(0.5)

    def move_to(self, nodes: RayNodes) -> None:
        """Another cluster, for the next start."""
        self._nodes = nodes

    def last_stored(self) -> int:
        newest = newest_checkpoint(self.folder)
        assert newest is not None
        return newest.step

    def check_batches(self) -> None:
        """Every global batch that any workers were given is that of the plan."""
        found = ids_of(self.place, "run", 1_000_000)
        assert sorted(found) == list(range(len(found)))
        assert len(found) >= self.last_stored()
        index = read_index(str(self.place / "shards"))
        per_epoch = PICTURES // BATCH
        for step, ids in found.items():
            epoch, batch = divmod(step, per_epoch)
            plan = plan_epoch(index, SEED, epoch, BATCH, OrderSettings())
            assert ids == sorted(batch_ids(plan, batch).tolist()), f"step {step}"

    def _begin(self, *arguments: object) -> "subprocess.Popen[bytes]":
        os.environ.update(self._nodes.environment)
        return begin_job(self.place, "run", *arguments, "--address", self._nodes.address)

    def _group(self, number: int) -> object:
        """Workers of the group that an event is of."""
        groups = [event for event in self._events[: number + 1] if event.kind == "workers"]
        return groups[-1].facts["count"] if groups else None

    def _shown(self) -> str:
        return "".join(f"\n  {event.at} {event.kind}: {event.text}" for event in self._events)

    def _log(self) -> str:
        return (self.place / "run.log").read_text()[-3000:]


def _workers_on(node: RayNode) -> list[int]:
    return [pid for pid in descendants(node.process.pid) if b"RayTrainWorker" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
