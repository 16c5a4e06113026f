"""One model on every worker: on its device, compiled if asked for, gradients averaged by DDP."""

from contextlib import AbstractContextManager, nullcontext

import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.world import World


def parallel_model(model: nn.Module, world: World, compiled: bool) -> nn.Module:
    """What the objective calls: `model` itself, or DDP around it where there are several workers.

    `model` is moved to its device and compiled in place, so its state keeps its names. Buffers are
    not broadcast at each step: frozen norms do not move.
    """
    model.to(world.device)
    if compiled:
        model.compile()
    if world.size == 1:
        return model
    if not torch.distributed.is_initialized():
        raise ValueError(
            f"{world.size} workers and no process group; start them through the cluster floor or "
            "call torch.distributed.init_process_group first"
        )
    wrapped = DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    # As an argument it is deprecated from torch 2.15 on; as an attribute it is the same in all.
    wrapped.broadcast_buffers = False
    return wrapped


def is_averaged(model: nn.Module) -> bool:
    """Whether backward passes of the model average gradients over the workers."""
    return isinstance(model, DistributedDataParallel)


def averaging(model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """The context of one backward pass; only the last one of an update averages over workers."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()
