"""A training state at rest: copied to the CPU, written to two local files, read and put back.

No random state is among it: the loop seeds every step from (seed, step, rank), which is as exact
and needs no gathering from the workers. Files are read with `weights_only`; nothing is unpickled.
Costs one copy of model, optimiser and moving average.
"""

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from models.artefact import STEP_KEY
from training.ema import Ema
from training.optimiser import load_optimiser_state

MODEL = "model.safetensors"
STATE = "state.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with its name and what is wrong with it."""


@dataclass(frozen=True)
class Position:
    """How far a run has come. Counts are of all workers together."""

    step: int = 0
    """Updates done, skipped ones included; also the number of the next update."""
    epoch: int = 0
    """Passes over the data that are complete."""
    batch: int = 0
    """Batches of the running epoch that were used."""
    pictures: int = 0
    """Pictures seen."""
    skipped: int = 0
    """Pictures that could not be decoded."""
    bad_steps: int = 0
    """Updates left out because the loss or the gradient was not finite."""
    bad_in_a_row: int = 0
    """The same, since the last good update."""


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that a checkpoint holds."""

    model: nn.Module
    """The plain module, not its DDP wrapper."""
    optimiser: AdamW
    ema: Ema | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the model's file says of itself, beside its tensors (`models.artefact`)."""


@dataclass(frozen=True)
class Snapshot:
    """A training state at rest on the CPU."""

    model: Mapping[str, Tensor]
    optimiser: Mapping[str, object]
    ema: Mapping[str, Tensor] | None
    position: Position
    world_size: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the model's file."""


def take_snapshot(state: TrainingState, position: Position, world_size: int) -> Snapshot:
    """A copy on the CPU that further training does not touch."""
    average = state.ema.state() if state.ema else None
    return Snapshot(
        model={name: _at_rest(tensor) for name, tensor in state.model.state_dict().items()},
        optimiser=cast("Mapping[str, object]", _copied(state.optimiser.state_dict())),
        ema=average and {name: _at_rest(tensor) for name, tensor in average.items()},
        position=position,
        world_size=world_size,
        metadata=dict(state.metadata),
    )


def restore(state: TrainingState, snapshot: Snapshot, name: str) -> Position:
    """Puts a snapshot into a training state and returns how far it had come.

    Raises:
        CheckpointError: it is of another model, optimiser or average; `name` says which one.
    """
    load_weights(state.model, snapshot.model, name)
    try:
        load_optimiser_state(state.optimiser, snapshot.optimiser)
        if state.ema:
            state.ema.load(snapshot.ema or {})
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return snapshot.position


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Copies every weight; all names and shapes must be those of the model.

    Raises:
        CheckpointError: they are not; nothing was copied, the first of each kind is named.
    """
    ours = model.state_dict()
    reshaped = [
        f"{key}, {_shape(weights[key])} and not {_shape(ours[key])}"
        for key in ours
        if key in weights and weights[key].shape != ours[key].shape
    ]
    kinds = {
        "missing": [key for key in ours if key not in weights],
        "unknown": [key for key in weights if key not in ours],
        "of another shape": reshaped,
    }
    problems = [f"{len(keys)} {kind} ({keys[0]})" for kind, keys in kinds.items() if keys]
    if problems:
        raise CheckpointError(
            f"{name} is of another model, tensors {', '.join(problems)}; use that run's recipe"
        )
    model.load_state_dict(dict(weights))


def write_files(snapshot: Snapshot, target: Path) -> None:
    """Writes model.safetensors and state.pt into a local folder."""
    metadata = {**snapshot.metadata, "format": "pt", STEP_KEY: str(snapshot.position.step)}
    save_file(dict(snapshot.model), target / MODEL, metadata=metadata)
    state = {
        "optimiser": snapshot.optimiser,
        "ema": snapshot.ema,
        "position": asdict(snapshot.position),
        "world_size": snapshot.world_size,
    }
    torch.save(state, target / STATE)


def read_files(model: Path, state: Path, name: str) -> Snapshot:
    """What `write_files` wrote.

    Raises:
        CheckpointError: these are other files; `name` says which.
    """
    try:
        content = torch.load(state, map_location="cpu", weights_only=True)
        return Snapshot(
            model=load_file(model),
            optimiser=content["optimiser"],
            ema=content["ema"],
            position=Position(**content["position"]),
            world_size=content["world_size"],
            metadata=_metadata(model),
        )
    except (
        KeyError,
        TypeError,
        RuntimeError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{name} is not a checkpoint of ours: {reason}") from error


def _metadata(model: Path) -> dict[str, str]:
    with safetensors.safe_open(model, framework="pt") as file:
        return dict(file.metadata() or {})


def _copied(value: object) -> object:
    match value:
        case Tensor():
            return _at_rest(value)
        case Mapping():
            return {key: _copied(item) for key, item in value.items()}
        case list():
            return [_copied(item) for item in value]
        case _:
            return value


def _at_rest(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
