"""Faults that take minutes to try: the head of a cluster is lost, a machine is cut off and back."""

from pathlib import Path

import pytest

from tests.cluster.networks import network
from tests.cluster.ray_nodes import RayNodes
from tests.cluster.story import Story
from training.control import ask_to_stop

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_a_run_whose_head_is_lost_goes_on_in_another_cluster_from_its_folder_alone(
    tmp_path: Path,
) -> None:
    with RayNodes() as first:
        head = first.start_head()
        first.have_nodes(2)
        story = Story(tmp_path, first, "resources.workers=2")
        story.wait("first_step", workers=2)
        story.wait_stored(40)
        first.kill_node(head)
        assert story.job.wait(timeout=120) != 0
        # What was the cluster's machines ends itself, for want of a head.
        story.wait_no_workers(timeout_s=120)
    with RayNodes() as second:
        second.start_head()
        second.have_nodes(1)
        story.move_to(second)
        story.resume("resources.workers=1")
        step = story.wait("first_step", workers=1)
        assert int(str(step.facts["start_step"])) >= 40
        ask_to_stop(story.folder, "a test")
        story.check_ended(0)
        story.check_batches()


def test_a_machine_that_is_cut_off_is_done_without_and_joins_again_when_it_is_back(
    tmp_path: Path,
) -> None:
    # Names of this machine mean nothing on those hosts: the collectives are told their cable.
    env = {"GLOO_SOCKET_IFNAME": "eth0"}
    with network(hosts=2) as net, RayNodes(ip=net.ip, env=env) as nodes:
        nodes.start_head()
        hosts = {nodes.add_node(host=host).name: host for host in net.hosts}
        told = ("resources.workers=1..2", "resources.hang_minutes=1")
        with Story(tmp_path, nodes, *told) as story:
            story.wait("first_step", workers=2)
            story.wait_stored(20)
            # Not the first worker's: Ray may have put the driver on that one here.
            lost = story.node_of_worker(1)
            host = hosts[lost.name]
            host.cut()
            assert "died" in story.wait("worker_lost", timeout_s=240).text
            story.wait("first_step", workers=1, timeout_s=240)
            # Nothing of it may be left that writes, though nobody could reach it to end it.
            story.wait_no_workers(on=lost, timeout_s=240)
            host.mend()
            nodes.kill_node(lost)
            nodes.add_node(host=host)
            story.wait("resized", timeout_s=120)
            story.wait("first_step", workers=2, timeout_s=120)
            ask_to_stop(story.folder, "a test")
            story.check_ended(0)
            story.check_batches()
