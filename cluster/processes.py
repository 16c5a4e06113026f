"""Ending a job the hard way, as a lost machine would: every process of it at once, with SIGKILL."""

import os
import signal
import subprocess


def kill_tree(pid: int) -> list[int]:
    """Kills a process and all that descend from it; returns the processes that were there.

    Each is stopped first, so that none can start another one unseen.
    """
    found: list[int] = []
    front = [pid]
    while front:
        for number in front:
            _signal(number, signal.SIGSTOP)
        found += front
        front = [number for number in descendants(pid) if number not in found]
    for number in found:
        _signal(number, signal.SIGKILL)
    return found


def descendants(pid: int) -> list[int]:
    """A process and all that descend from it, parents first."""
    pairs = _parents()
    found = [pid]
    for number in found:
        found += [child for child, parent in pairs if parent == number]
    return found


def _parents() -> list[tuple[int, int]]:
    """(process, its parent) of every process of this machine."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return [(int(pid), int(parent)) for pid, parent in pairs]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
