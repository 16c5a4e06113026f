"""Hosts on this machine that have a network of their own, which can be cut and mended (root only).

Each host is a network namespace on one bridge. A cut takes the host's cable out: packets vanish, no
connection is closed, as when a switch dies; killing processes can not show that.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_NET = "10.99.7"


@dataclass(frozen=True)
class Host:
    """One namespace with its cable."""

    name: str
    """Of the namespace; the cable's end on this side has the same one."""
    ip: str

    def cut(self) -> None:
        _ip("link", "set", self.name, "down")

    def mend(self) -> None:
        _ip("link", "set", self.name, "up")


@dataclass(frozen=True)
class Network:
    """A bridge, this machine's own address on it, and hosts."""

    ip: str
    hosts: tuple[Host, ...]


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    """A network for the block; the test skips, saying so, where it may not be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip` (iproute2)")
    tag = f"qp{secrets.token_hex(2)}"
    made = tuple(Host(f"{tag}h{number}", f"{_NET}.{number + 2}") for number in range(hosts))
    try:
        _ip("link", "add", f"{tag}b", "type", "bridge")
        _ip("addr", "add", f"{_NET}.1/24", "dev", f"{tag}b")
        _ip("link", "set", f"{tag}b", "up")
        for host in made:
            _plug_in(host, f"{tag}b")
        yield Network(f"{_NET}.1", made)
    finally:
        for host in made:
            _ip("netns", "del", host.name, check=False)
            _ip("link", "del", host.name, check=False)
        _ip("link", "del", f"{tag}b", check=False)


def _plug_in(host: Host, bridge: str) -> None:
    name = host.name
    _ip("netns", "add", name)
    _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", name, "master", bridge, "up")
    _ip("-n", name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        pytest.skip(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
