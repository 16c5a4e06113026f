"""Seconds from a fault to the next new step, and steps that are computed a second time.

    python -m benchmarks.recovery --repeats 3

A small pretraining run on two Ray nodes of this machine meets, one after another: a killed worker,
a hung one, a machine that is lost at once, one that comes, one that announces its end, and a killed
driver with a resume by a new job. Times are those of the run's own history, so they hold what a
user waits for: noticing, new processes, the checkpoint, the first step. The model is tiny: of a
large one add the load of its checkpoint and the first batch.
"""

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.processes import kill_tree
from tests.cluster.killing import last_step
from tests.cluster.ray_nodes import RayNode, RayNodes
from tests.cluster.story import Story
from training.history import Event
from training.moments import seconds_between, utc_now

HANG_MINUTES = 0.15
NOTICE_S = 10


@dataclass(frozen=True)
class Recovery:
    """What one fault cost."""

    noticed_s: float | None
    """Until the history tells it; None where nothing is lost."""
    step_s: float
    """Until the first new step."""
    steps_again: int


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[Recovery]] = {}
    with RayNodes() as nodes:
        nodes.start_head()
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(prefix="recovery-") as place:
                for name, recovery in _one_run(Path(place), nodes):
                    found.setdefault(name, []).append(recovery)
                    print(f"{name}: {recovery}", flush=True)
    print("| fault | noticed after s | first new step after s | steps made again |")
    print("|---|---|---|---|")
    for name, recoveries in found.items():
        noticed = [one.noticed_s for one in recoveries if one.noticed_s is not None]
        seen = f"{statistics.median(noticed):.1f}" if noticed else "-"
        step = statistics.median(one.step_s for one in recoveries)
        again = statistics.median(one.steps_again for one in recoveries)
        print(f"| {name} | {seen} | {step:.1f} | {again:.0f} |")


def _one_run(place: Path, nodes: RayNodes) -> Iterator[tuple[str, Recovery]]:
    first, second = nodes.have_nodes(2)
    began = utc_now()
    told = ("resources.workers=1..2", f"resources.hang_minutes={HANG_MINUTES}")
    with Story(place, nodes, *told) as story:
        event = story.wait("first_step", workers=2)
        yield "start of a job", Recovery(None, seconds_between(began, event.at), 0)
        story.wait_stored(20)

        def cost(fault: Callable[[], object], sign: str, workers: int) -> Recovery:
            time.sleep(3)
            began = utc_now()
            fault()
            noticed = story.wait(sign)
            return _recovery(began, noticed, story.wait("first_step", workers=workers))

        def worker() -> int:
            return story.workers()[0]

        yield "worker killed", cost(lambda: os.kill(worker(), signal.SIGKILL), "worker_lost", 2)
        yield "worker hangs", cost(lambda: os.kill(worker(), signal.SIGSTOP), "hung", 2)
        yield "machine lost", cost(lambda: nodes.kill_node(first), "worker_lost", 1)
        yield "machine comes", cost(nodes.add_node, "resized", 2)
        yield "machine with notice", cost(partial(_notice, nodes, second), "worker_lost", 1)
        yield "driver killed, resumed", _resumed(story)
        story.job.send_signal(signal.SIGTERM)
        story.check_ended(0)
        story.check_batches()


def _notice(nodes: RayNodes, node: RayNode) -> None:
    nodes.drain_node(node, NOTICE_S)
    gone = threading.Timer(NOTICE_S, nodes.kill_node, [node])
    gone.daemon = True
    gone.start()


def _resumed(story: Story) -> Recovery:
    time.sleep(3)
    began = utc_now()
    kill_tree(story.job.pid)
    story.job.wait()
    made = last_step(story.place, "run") + 1
    story.resume()
    event = story.wait("first_step", workers=1)
    again = made - int(str(event.facts["start_step"]))
    return Recovery(None, seconds_between(began, event.at), again)


def _recovery(began: str, noticed: Event | None, step: Event) -> Recovery:
    again = step.facts["steps_again"]
    return Recovery(
        seconds_between(began, noticed.at) if noticed else None,
        seconds_between(began, step.at),
        again if isinstance(again, int) else 0,
    )


if __name__ == "__main__":
    main()
