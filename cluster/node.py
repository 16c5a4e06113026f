"""A node that is about to go says so to Ray, and Ray to the run, which stores a checkpoint.

On Kubernetes the pod's `preStop` drains; on a virtual machine of AWS or Google Cloud `watch` asks
the machine's metadata for the notice of a spot machine, which comes 120 or 30 seconds before.
"""

import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, assert_never

logger = logging.getLogger(__name__)

Cloud = Literal["aws", "gcp"]

METADATA: dict[Cloud, str] = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
}
"""Where a machine asks about itself, without leaving it."""

GCP_NOTICE_S = 25
"""Seconds left when Google Cloud says so: it promises 30."""

_NO_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")

POLL_S = 2.0
ANSWER_S = 5
"""Seconds between two questions, and that an answer may take."""


class NodeError(RuntimeError):
    """What could not be asked or told; one line with the way out."""


def work_here(processes: Path = Path("/proc")) -> bool:
    """Whether a process of this machine, or of this container, does work that Ray gave it.

    Ray writes into a process's title what it does: its own agents, or `ray::IDLE`, or our worker.
    """
    return any(_is_work(file) for file in processes.glob("[0-9]*/cmdline"))


def drain_node(
    deadline_s: int,
    address: str = "auto",
    node_id: str | None = None,
    at_work: Callable[[], bool] = work_here,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Tells Ray that a node ends in `deadline_s` seconds, and returns when they are over, or when
    there is no work on it any more.

    `node_id` None is the node of this machine. Nothing new is placed on a draining node, and
    a run on it is told. Raises NodeError where Ray cannot be told.
    """
    ends = time.monotonic() + deadline_s
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the node goes"]
    command += ["--deadline-remaining-seconds", str(deadline_s)]
    command += [] if node_id is None else ["--node-id", node_id]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise NodeError(f"Ray did not answer within {deadline_s} s: the head is away") from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise NodeError(f"Ray could not be told that this node goes: {said[-1] if said else '?'}")
    logger.info("Ray knows that this node goes in %d s", deadline_s)
    while time.monotonic() < ends and at_work():
        sleep(1.0)


def _is_work(file: Path) -> bool:
    try:
        title = file.read_bytes().decode(errors="replace")
    except OSError:
        return False
    return title.startswith("ray::") and not title.startswith(_NO_WORK)


def wait_for_notice(
    cloud: Cloud,
    metadata: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> int:
    """Returns when this spot machine is told that it goes: the seconds that are left.

    A metadata service that is away for a moment is asked again; raises NodeError where there was
    none from the beginning, since then this is no machine of that cloud.
    """
    url = metadata or METADATA[cloud]
    heard = False
    while True:
        try:
            left = _asked(cloud, url, now())
        except OSError as error:
            if not heard:
                raise NodeError(f"no metadata of {cloud} at {url}: {error}") from error
            logger.warning("the machine's metadata do not answer: %s", error)
            left = None
        else:
            heard = True
        if left is not None:
            return left
        sleep(POLL_S)


def _asked(cloud: Cloud, url: str, now: datetime) -> int | None:
    """Seconds that are left, None where no end is announced; OSError where nobody answers."""
    match cloud:
        case "aws":
            return _aws_notice(url, now)
        case "gcp":
            flavour = {"Metadata-Flavor": "Google"}
            said = _get(f"{url}/computeMetadata/v1/instance/preempted", flavour)
            return GCP_NOTICE_S if said == "TRUE" else None
        case _:
            assert_never(cloud)


def _aws_notice(url: str, now: datetime) -> int | None:
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _get(f"{url}/latest/api/token", ttl, method="PUT")
    header = {"X-aws-ec2-metadata-token": token or ""}
    said = _get(f"{url}/latest/meta-data/spot/instance-action", header)
    if said is None:
        return None
    ends = datetime.fromisoformat(json.loads(said)["time"])
    return max(1, int((ends - now).total_seconds()))


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The text at a URL, None where there is nothing."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Never through a proxy: the address is of this machine's own host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ANSWER_S) as answer:
            text: bytes = answer.read(4096)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return text.decode().strip()
