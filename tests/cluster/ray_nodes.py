"""Several Ray nodes on this machine, each a process tree of its own that can be taken away.

    with RayNodes() as nodes:
        nodes.start_head()
        node = nodes.add_node(num_cpus=1)
        ...                             # nodes.address, nodes.jobs_url, nodes.environment
        nodes.kill_node(node)

A node is `ray start --block`: SIGKILL of its tree is a lost machine, SIGTERM one that is shut down,
`ray drain-node` the notice before a spot machine goes. Starting one costs 3 to 8 s, so tests share
a head (fixture `ray_nodes`) and ask for the workers' nodes they need with `have_nodes`.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import kill_tree
from tests.cluster.networks import Host

_START_S = 120
_PR_SET_PDEATHSIG = 1
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_STORE_BYTES = 80 << 20
"""Of each node's object store: Ray takes no less than 75 MiB."""
_QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # A silent node is lost after about 3 s, not after 15 to 30.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True)
class RayNode:
    """One node."""

    name: str
    """Ray's node name, of our choice."""
    process: "subprocess.Popen[bytes]"
    """`ray start --block`; all of the node descends from it."""
    log: Path


class RayNodes:
    """A cluster on loopback; everything it started is ended at the end of the `with` block."""

    def __init__(
        self,
        token: str | None = None,
        env: Mapping[str, str] | None = None,
        ip: str = "127.0.0.1",
    ) -> None:
        """`token` turns token authentication on; `env` goes to every process of the cluster; the
        head has the address `ip`.
        """
        self._token = token
        self._ip = ip
        self._env = dict(env or {})
        # A short path: the sockets below it may have 107 characters.
        self._place = Path(tempfile.mkdtemp(prefix="qp", dir="/tmp"))
        self._port = self._dashboard_port = 0
        self._count = 0
        self.nodes: list[RayNode] = []
        """Alive as far as we know, the head first."""

    @property
    def address(self) -> str:
        """For `ray.init` and `--address` of a driver here: host:port."""
        return f"{self._ip}:{self._port}"

    @property
    def jobs_url(self) -> str:
        """Of the Jobs API and the dashboard."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a client is let in; to be added to its own."""
        if self._token is None:
            return {"RAY_AUTH_MODE": "disabled"}
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def start_head(self, num_cpus: int = 0) -> RayNode:
        """The head with its dashboard; without CPUs no worker runs on it."""
        self._port, self._dashboard_port, client_port = free_ports(3)
        node = self._start(
            "head", num_cpus, None, "--head", "--port", self._port, "--temp-dir", self._place / "r",
            "--dashboard-port", self._dashboard_port, "--include-dashboard", "true",
            "--ray-client-server-port", client_port,
        )  # fmt: skip
        self._wait_until(lambda: "head" in self._alive(), node)
        return node

    def add_node(
        self,
        num_cpus: int = 1,
        labels: Mapping[str, str] | None = None,
        host: Host | None = None,
    ) -> RayNode:
        """One more node, registered when this returns; on a host of a network of its own."""
        told = [f"{key}={value}" for key, value in (labels or {}).items()]
        more = ["--labels", ",".join(told)] if told else []
        node = self._start(f"node{self._count}", num_cpus, host, "--address", self.address, *more)
        self._wait_until(lambda: node.name in self._alive(), node)
        return node

    def have_nodes(self, count: int, num_cpus: int = 1) -> list[RayNode]:
        """Adds or kills nodes until there are `count` beside the head, and returns those."""
        self.nodes = [node for node in self.nodes if node.process.poll() is None]
        for node in self.nodes[1 + count :]:
            self.kill_node(node)
        for _ in range(count - len(self.nodes) + 1):
            self.add_node(num_cpus)
        return self.nodes[1:]

    def kill_node(self, node: RayNode) -> None:
        """SIGKILL of every process of a node at once: a machine that is gone."""
        kill_tree(node.process.pid)
        node.process.wait()
        self.nodes = [other for other in self.nodes if other is not node]

    def terminate_node(self, node: RayNode, timeout_s: float = 30) -> None:
        """SIGTERM: a machine that is shut down in order."""
        node.process.send_signal(signal.SIGTERM)
        try:
            node.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill_node(node)

    def drain_node(self, node: RayNode, deadline_s: int) -> None:
        """The notice of a spot machine: gone in `deadline_s` seconds; taking it away is yours."""
        ask = [*_RAY, "drain-node", "--address", self.address, "--node-id", self.node_id(node)]
        ask += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        ask += ["--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run(ask, env=self._environment(), check=True, timeout=60, capture_output=True)

    def node_id(self, node: RayNode) -> str:
        """Ray's id of a node, in hexadecimal."""
        return self._alive()[node.name]

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            self.kill_node(node)
        shutil.rmtree(self._place, ignore_errors=True)

    def _start(self, name: str, num_cpus: int, host: Host | None, *arguments: object) -> RayNode:
        inside = ["ip", "netns", "exec", host.name] if host else []
        ip = host.ip if host else self._ip
        command = [
            *inside, *_RAY, "start", "--block", "--node-ip-address", ip, "--node-name", name,
            "--num-cpus", num_cpus, "--object-store-memory", _STORE_BYTES,
            "--dashboard-agent-listen-port", 0, *arguments,
        ]  # fmt: skip
        log = self._place / f"{name}.log"
        with log.open("wb") as told:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=told,
                stderr=told,
                env=self._environment(),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        node = RayNode(name, process, log)
        self._count += 1
        self.nodes.append(node)
        return node

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **_QUICK, **self._env, **self.environment}

    def _alive(self) -> dict[str, str]:
        """Ray's ids of the nodes that the head holds for alive, by name."""
        header = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        request = urllib.request.Request(f"{self.jobs_url}/nodes?view=summary", headers=header)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                told: Any = json.load(answer)
        except (urllib.error.URLError, OSError):
            return {}
        raylets = [entry["raylet"] for entry in told["data"]["summary"]]
        return {
            raylet["nodeName"]: raylet["nodeId"] for raylet in raylets if raylet["state"] == "ALIVE"
        }

    def _wait_until(self, is_there: Any, node: RayNode) -> None:
        deadline = time.monotonic() + _START_S
        while not is_there():
            if node.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"node {node.name} did not start:\n{node.log.read_text()[-2000:]}")
            time.sleep(0.2)


def _end_with_parent() -> None:
    """SIGTERM to this process when the tests' own is gone, however that ended (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that Ray gives to its workers."""
    found: list[int] = []
    for port in range(6400 + os.getpid() % 1500, 9900):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    pytest.fail("no free ports between 6400 and 9900")


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[RayNodes]:
    """A head without CPUs, for the whole session; say with `have_nodes` what the test needs."""
    with RayNodes() as nodes:
        nodes.start_head()
        yield nodes
