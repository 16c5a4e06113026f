"""A killed tree leaves nothing behind."""

import subprocess
import sys
import time

from cluster.processes import descendants, kill_tree

CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
)
TREE = CHILD.format(CHILD.format("import time; time.sleep(60)"))


def test_a_process_is_killed_with_its_children_and_theirs() -> None:
    root = subprocess.Popen([sys.executable, "-c", TREE])
    deadline = time.monotonic() + 20
    while len(descendants(root.pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    grandchild = descendants(root.pid)[-1]
    killed = kill_tree(root.pid)
    assert killed[0] == root.pid
    assert grandchild in killed
    assert root.wait(timeout=10) == -9
