"""One run through Ray meets one fault after another, and every batch is what it should be.

Several nodes on this machine. Each stage ends in the run's history, where a person would look.
"""

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.ray_nodes import RayNode, RayNodes
from tests.cluster.story import Story

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_outlives_a_killed_a_hung_and_a_leaving_worker_grows_again_and_stops_when_asked(
    tmp_path: Path, ray_nodes: RayNodes
) -> None:
    leaving, _ = ray_nodes.have_nodes(2)
    told = ("resources.workers=1..2", "resources.hang_minutes=0.15")
    with Story(tmp_path, ray_nodes, *told) as story:
        _go_through(story, ray_nodes, leaving)


def _go_through(story: Story, ray_nodes: RayNodes, leaving: RayNode) -> None:
    story.wait("first_step", workers=2)
    story.wait_stored(20)

    os.kill(story.workers()[0], signal.SIGKILL)
    lost = story.wait("worker_lost")
    assert "died" in lost.text
    assert story.wait("first_step", workers=2).facts["start_step"] > 0

    os.kill(story.workers()[1], signal.SIGSTOP)
    hung = story.wait("hung")
    assert "no progress for" in hung.text
    story.wait("first_step", workers=2)

    ray_nodes.drain_node(leaving, deadline_s=6)
    story.wait("preemption_notice")
    assert story.wait("worker_lost").facts["announced"] is True
    ray_nodes.kill_node(leaving)
    after = story.wait("first_step", workers=1)
    assert after.facts["steps_again"] < 100

    ray_nodes.add_node()
    assert story.wait("resized").facts == {"before": 1, "after": 2}
    grown = story.wait("first_step", workers=2)

    story.job.send_signal(signal.SIGTERM)
    story.check_ended(0)
    stopped = story.wait("stopped")
    assert stopped.step == story.last_stored() >= grown.step
    story.check_batches()
