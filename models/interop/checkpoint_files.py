"""Tensors out of others' checkpoints, from any path or URL, without running their code."""

import argparse
import io
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

_WRAPPERS = ("model", "state_dict")
_PREFIX = "module."

# What torch's unpickler raises on bytes that are none of its own (2,000 damaged files tried).
_NO_PICKLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    AssertionError,
    AttributeError,
    TypeError,
    OverflowError,
    struct.error,
)


class WeightsError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model tensor by tensor."""


@dataclass(frozen=True)
class CheckpointFile:
    """What a file of weights holds."""

    tensors: dict[str, Tensor]
    """By name, on the CPU, without the `module.` of a parallel wrapper."""
    metadata: dict[str, str]
    """Of a safetensors header, and of a `torch.save` file the texts beside its state dict."""
    arguments: dict[str, object] = field(default_factory=dict)
    """The plain values of the command line (`args`) that public training code keeps in its files:
    numbers, texts, switches.
    """


def read_tensors(source: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, without the `module.` of a parallel wrapper.

    `source` is a path or an fsspec URL of a safetensors file or of a `torch.save` file that holds a
    bare state dict or one under "model" or "state_dict". WeightsError where it is neither; OSError
    where it cannot be read.
    """
    return read_checkpoint(source).tensors


def read_checkpoint(source: str) -> CheckpointFile:
    """Tensors as `read_tensors`, and what the file says beside them. Raises as `read_tensors`."""
    with fsspec.open(source, "rb") as file:
        content: bytes = file.read()
    if not content:
        raise WeightsError(f"{source} is empty; fetch it again")
    if source.endswith(".safetensors") or _has_safetensors_header(content):
        tensors = _without_prefix(_read_safetensors(content, source))
        return CheckpointFile(tensors, _safetensors_metadata(content))
    loaded = _read_pickle(content, source)
    tensors = _without_prefix(_state_dict(loaded, source))
    return CheckpointFile(tensors, _texts(loaded), _arguments(loaded))


def _has_safetensors_header(content: bytes) -> bool:
    """By its ninth byte: a signed URL does not end with the name of its file."""
    return content[8:9] == b"{"


def _read_safetensors(content: bytes, source: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{source} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def _safetensors_metadata(content: bytes) -> dict[str, str]:
    """The format: eight bytes of length, then a JSON header of that many bytes."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return dict(header.get("__metadata__") or {})


def _texts(loaded: object) -> dict[str, str]:
    if not isinstance(loaded, Mapping):
        return {}
    return {str(key): value for key, value in loaded.items() if isinstance(value, str)}


def _arguments(loaded: object) -> dict[str, object]:
    args = loaded.get("args") if isinstance(loaded, Mapping) else None
    said = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(said, Mapping):
        return {}
    return {
        str(key): value
        for key, value in said.items()
        if value is None or isinstance(value, (bool, int, float, str))
    }


_STAND_INS: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
]
"""What published files hold beside tensors, as plain data: DETR's their arguments; DAT's and Swin's
a tree of settings, whose class is a dictionary with attributes, as an OrderedDict is.
"""


def _read_pickle(content: bytes, source: str) -> object:
    """Plain data and the settings of _STAND_INS; no more gets in."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            loaded: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return loaded
    except _NO_PICKLE as error:
        raise WeightsError(
            f"{source} holds no plain tensors that torch.load can read ({_reason(error)}); "
            "give a state dict saved by torch.save, or a safetensors file"
        ) from error


def _reason(error: Exception) -> str:
    """One line, without torch's advice to run what the file brings with it."""
    text = str(error)
    told = text.partition("WeightsUnpickler error:")[2].strip() or text.strip()
    line = told.partition("\n")[0].partition(". Please use")[0]
    return line or type(error).__name__


def _state_dict(loaded: object, source: str) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{source} holds a {type(loaded).__name__}, not a state dict; save one")
    for wrapper in _WRAPPERS:
        inner = loaded.get(wrapper)
        if isinstance(inner, Mapping):
            return _state_dict(inner, source)
    others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others or not loaded:
        found = ", ".join(map(str, others[:5])) or "nothing"
        raise WeightsError(
            f"{source} is no state dict: besides tensors it holds {found}; "
            'save the state dict bare, or under "model" or "state_dict"'
        )
    return dict(loaded)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
