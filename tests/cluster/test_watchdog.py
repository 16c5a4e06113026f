"""A worker without progress says where it hung, and ends."""

import subprocess
import sys
import threading
import time

from cluster.watchdog import EXIT_STATUS, Watchdog

HANGING = """
import sys, time
from cluster.watchdog import Watchdog

def stuck_in_the_loop():
    time.sleep(60)

with Watchdog(0.5, lambda text, step: print(step, text, flush=True)) as dog:
    dog.beat(7)
    stuck_in_the_loop()
"""

WITHOUT_PYTHON = """
import ctypes
import cluster.watchdog
from cluster.watchdog import Watchdog

cluster.watchdog.RESERVE_S = 0.0
with Watchdog(0.5, lambda text, step: print(step, text, flush=True)) as dog:
    dog.beat(1)
    ctypes.PyDLL(None).sleep(60)
"""


def test_a_hung_worker_tells_its_step_and_place_dumps_its_stacks_and_ends() -> None:
    done = _run(HANGING)
    assert done.returncode == EXIT_STATUS
    assert done.stdout.startswith("7 no progress for ")
    assert "after step 7, in stuck_in_the_loop (<string>:6)" in done.stdout
    assert "in stuck_in_the_loop" in done.stderr
    assert "Current thread" in done.stderr


def test_code_that_holds_pythons_lock_ends_too() -> None:
    done = _run(WITHOUT_PYTHON)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Timeout (0:00:00" in done.stderr


def test_signs_of_life_keep_it_quiet_and_the_end_of_the_block_lets_it_go() -> None:
    told: list[str] = []
    ended = threading.Event()
    with Watchdog(0.5, lambda text, step: told.append(text), lambda status: ended.set()) as dog:
        for step in range(15):
            dog.beat(step)
            time.sleep(0.05)
    assert not ended.wait(0.7)
    assert told == []


def test_the_first_sign_of_life_may_take_four_times_as_long() -> None:
    told: list[str] = []
    with Watchdog(0.1, lambda text, step: told.append(text), lambda status: None) as dog:
        time.sleep(0.25)
        assert told == []
        dog.beat(1)
        time.sleep(0.4)
    assert len(told) == 1


def _run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
