"""The service from submission to a finetuned detector, on several Ray nodes and a real S3 server.

    python -m tests.cluster.service_walk OUT.md [--pictures FOLDER] [--labelled SET]

submits a pretraining, follows it, kills a node under it, sees it go on with the worker that is
left, stops it, resumes it with more workers than before from its URL alone, and finetunes from it.
Every command is one that a person types; OUT.md gets them with what they answered.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.jobs.status import RunStatus, read_status
from data.synthetic import write_labelled_scenes, write_scenes
from tests.cluster.ray_nodes import RayNode, RayNodes
from tests.servers import S3Store, serve_s3
from training.history import Event, read_history
from training.run_folder import RunFolder, open_run_folder

TOKEN = "0123456789abcdef" * 4
_WAIT_S = 300
_ORDINARY = re.compile(r"127\.0\.0\.1:\d+")
_NOISE = re.compile(
    r"PlacementGroupCleaner|TrainController|raylet|core_worker\.cc|job_manager\.py|botocore|"
    r"autoscaler|\[repeated |\(pid=|^  File |^    (?!\d{4}-)|^Traceback|^\s+\^+$"
)
_PROCESS = re.compile(r"\(RayTrainWorker pid=\d+(, ip=[\d.]+)?\) ")


@dataclass(frozen=True)
class Size:
    """How much of it."""

    pretraining: str
    """A recipe's name or file."""
    finetuning: str
    pretrain: Sequence[str]
    """Overrides."""
    finetune: Sequence[str]
    killed_after: int
    """Steps before the node is lost."""
    stopped_after: int
    """Steps between its loss and the stop."""


@dataclass
class Walk:
    """Commands against one cluster and one bucket, with what they answered."""

    nodes: RayNodes
    store: S3Store
    place: Path
    """Working directory of the commands."""
    told: list[str] = field(default_factory=list)
    """Lines of the transcript, in Markdown."""

    @property
    def environment(self) -> dict[str, str]:
        """Of a person with credentials of the store and the cluster's token."""
        code = {"PYTHONPATH": str(Path(__file__).parents[2])}
        return {**os.environ, **store_environment(self.store), **self.nodes.environment, **code}

    def say(self, text: str) -> None:
        """A paragraph of the transcript."""
        self.told += ["", text, ""]

    def command(self, *words: str, status: int = 0) -> str:
        """A command that has to end with this status; returns what it said."""
        done = subprocess.run(
            _line(words), cwd=self.place, env=self.environment, text=True, timeout=_WAIT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        self._tell(words, done.stdout)
        assert done.returncode == status, f"{words} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    @contextmanager
    def following(self, *words: str) -> Iterator["subprocess.Popen[str]"]:
        """A command that goes on while other things happen; waited for at the end."""
        heard = self.place / f"followed-{len(self.told)}.log"
        with heard.open("w") as out:
            process = subprocess.Popen(
                _line(words), cwd=self.place, env=self.environment, text=True, stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield process
            process.wait(_WAIT_S)
        finally:
            process.kill()
            process.wait()
            self._tell(words, heard.read_text())

    def folder(self, run: str) -> RunFolder:
        """A run's folder, as this process reads it."""
        return open_run_folder(run, self.store.storage_options)

    def status(self, run: str) -> RunStatus:
        """As `querypatch status` tells it."""
        return read_status(self.folder(run))

    def events(self, run: str, kind: str) -> list[Event]:
        """Of one kind, in order."""
        return [event for event in read_history(self.folder(run)) if event.kind == kind]

    def _tell(self, words: Sequence[str], said: str) -> None:
        shown = " ".join(f"'{word}'" if "#" in word else word for word in words)
        text = f"$ querypatch {shown}\n{said}".replace(self.nodes.jobs_url, "http://head:8265")
        text = _ORDINARY.sub("127.0.0.1:PORT", text.replace(f"{self.place}/", ""))
        self.told += ["```", *_without_noise(text), "```"]


def walk_whole(walk: Walk, size: Size, pictures: Path, labelled: str) -> str:
    """The whole walk; returns the URL of the finetuned run. Fails where a step of it does."""
    address = ("--address", walk.nodes.jobs_url)
    bucket = walk.store.url
    night, detector = f"{bucket}/runs/night", f"{bucket}/runs/detector"
    walk.say("Pictures become shards in the bucket, once.")
    walk.command("shards", "write", str(pictures), f"{bucket}/pretrain")
    walk.command("shards", "write", labelled, f"{bucket}/labelled")
    walk.say("The cluster has a head and two nodes of one CPU. The run takes one worker or two.")
    first, _ = walk.nodes.have_nodes(2)
    submitted = walk.command(
        "submit", size.pretraining, f"run={night}", f"data.shards={bucket}/pretrain",
        "resources.workers=1..2", *size.pretrain, *address,
    )  # fmt: skip
    job = submitted.split("\n")[-3 if "follow it with" in submitted else -2]
    with walk.following("logs", night, "-f", *address):
        lose_a_node(walk, night, size, first)
        walk.say("A node is lost: SIGKILL of all its processes. The run goes on with one worker.")
        walk.command("status", night)
        walk.say("It is stopped, with a checkpoint, and the cluster is a node short.")
        walk.command("stop", night)
        walk.say("The job's log, which was followed all the while:")
    stopped = walk.status(night)
    assert stopped.state == "stopped"
    assert stopped.checkpoint_step == stopped.step, "the stop left no checkpoint of its step"
    walk.command("jobs", *address)
    walk.say("Two nodes again. Nothing but the URL is needed.")
    walk.nodes.have_nodes(2)
    walk.command("resume", night, "resources.workers=2", *address, "--follow")
    resumed = walk.status(night)
    assert resumed.state == "finished"
    assert walk.events(night, "workers")[-1].facts["count"] == 2
    walk.command("status", night)
    walk.say("The pretrained transformer is in the bucket; a detector begins with it.")
    walk.command(
        "submit", size.finetuning, f"run={detector}", f"init={night}",
        f"data.train={bucket}/labelled", *size.finetune, *address, "--follow",
    )  # fmt: skip
    assert walk.status(detector).state == "finished"
    walk.command("weights", "show", detector)
    assert job, submitted
    return detector


def lose_a_node(walk: Walk, run: str, size: Size, node: RayNode) -> None:
    """Kills a node under a run of two workers, and returns when one has gone on."""
    wait_until(lambda: reached(walk, run, size.killed_after), f"step {size.killed_after}")
    assert walk.events(run, "workers")[-1].facts["count"] == 2
    walk.nodes.kill_node(node)
    wait_until(lambda: len(walk.events(run, "workers")) >= 2, "workers after the loss")
    assert walk.events(run, "workers")[-1].facts["count"] == 1
    again = walk.status(run).checkpoint_step or 0
    wait_until(lambda: reached(walk, run, again + size.stopped_after), "steps after the loss")


def reached(walk: Walk, run: str, step: int) -> bool:
    """Whether a run has a checkpoint of that step or a later one."""
    try:
        status = walk.status(run)
    except ValueError:
        return False
    return (status.checkpoint_step or 0) >= step


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Looks every half second; fails after minutes."""
    deadline = time.monotonic() + _WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"no {what} within {_WAIT_S} s"
        time.sleep(0.5)


def cluster_environment(store: S3Store) -> dict[str, str]:
    """Of the cluster's machines: this Python, and the store's credentials."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**store_environment(store), "PATH": path}


def store_environment(store: S3Store) -> dict[str, str]:
    """Credentials and endpoint the standard way."""
    return {
        "AWS_ACCESS_KEY_ID": str(store.storage_options["key"]),
        "AWS_SECRET_ACCESS_KEY": str(store.storage_options["secret"]),
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def _without_noise(text: str) -> list[str]:
    """Lines without those of Ray's own processes, and each once.

    All nodes of this machine read the same log files, so a worker's line comes once for each.
    """
    lines = [_PROCESS.sub("", line) for line in text.splitlines()]
    kept = [line.rstrip() for line in lines if not _NOISE.search(line)]
    return list(dict.fromkeys(line for line in kept if line))


def _line(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "querypatch", *words]


RECORDED = Size(
    pretraining="pretrain/tiny_cpu",
    finetuning="finetune/tiny_cpu",
    pretrain=(
        "data.held_out=null", "loop.evaluate_every=null", "checkpoints.best_metric=null",
        "loop.steps=300", "loop.log_every=20", "loop.checkpoint_every_steps=20",
    ),
    finetune=("loop.steps=60", "loop.log_every=20", "loop.evaluate_every=null"),
    killed_after=60,
    stopped_after=40,
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Records the walk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--labelled")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as made, serve_s3(Path(made) / "s3") as store:
        place = Path(made) / "here"
        place.mkdir()
        if given.pictures is None:
            write_scenes(place / "pictures", seed=4, count=200)
        if given.labelled is None:
            write_labelled_scenes(place, "train", seed=2, count=60)
        with RayNodes(TOKEN, cluster_environment(store)) as nodes:
            nodes.start_head()
            walk = Walk(nodes, store, place)
            try:
                walk_whole(
                    walk,
                    RECORDED,
                    given.pictures or place / "pictures",
                    given.labelled or str(place / "annotations/instances_train.json"),
                )
            finally:
                given.out.write_text("\n".join(walk.told).lstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
