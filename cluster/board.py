"""The board between a job's driver and its first worker: how far the run is, and "please stop".

One small Ray actor per job. The worker pins up its newest status and reads whether it should stop;
the driver reads the status for its progress bar. Nothing waits on it: a lost board costs the bar only.
"""

import logging
import time
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

logger = logging.getLogger(__name__)

EXCHANGE_INTERVAL_S = 0.5


@ray.remote(num_cpus=0, max_restarts=3)
class Board:
    """Holds one status and one stop request."""

    def __init__(self) -> None:
        self._status: dict[str, float] = {}
        self._stop = False

    def exchange(self, status: dict[str, float]) -> bool:
        """Pin up the worker's status; true if the run is asked to stop."""
        self._status = status
        return self._stop

    def request_stop(self) -> None:
        """Ask the run to write a checkpoint and end."""
        self._stop = True

    def status(self) -> dict[str, float]:
        """What the worker pinned up last; empty before its first step."""
        return self._status
