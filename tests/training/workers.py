"""Processes for tests that need some workers, or one to kill; forked where torch is loaded."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import torch.distributed


def workers_context() -> ForkServerContext:
    """Processes start in milliseconds once the server of the session has imported the code."""
    context = multiprocessing.get_context("forkserver")
    # The first optimiser of a process imports torch._dynamo: seconds that the server spends once.
    loaded = ["torch._dynamo", "tests.training.small", "training.checkpoint", "pretrain.run"]
    context.set_forkserver_preload(loaded)
    return context


def on_workers(function: Callable[[int, Path], None], folder: Path, size: int = 2) -> None:
    """Runs `function(rank, folder)` on the workers of one gloo group; fails where one fails."""
    context = workers_context()
    workers = [
        context.Process(target=_as_worker, args=(function, rank, size, folder))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * size, f"workers ended with {codes}, see their errors above"


def _as_worker(function: Callable[[int, Path], None], rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size
    )
    try:
        function(rank, folder)
    finally:
        torch.distributed.destroy_process_group()
