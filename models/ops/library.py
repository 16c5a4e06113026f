"""The compiled operator library `querypatch_ops`: found, checked against this Python, loaded once.

It is a top-level file of its own, so that a checkout shipped to a cluster finds the binary of the
image it runs in. It adds the operators `querypatch::...` to torch (models/ops/csrc/operators.cpp).
"""

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

from models.ops import nvrtc

NAME = "querypatch_ops"
SCHEMA = 1
"""The number of schemas and C functions that this Python expects, as operators.cpp has it."""


@dataclass(frozen=True)
class Library:
    """A library whose operators torch knows now."""

    path: str
    cpu_isa: str
    """Instructions of the CPU kernels; "" where QUERYPATCH_CPU_ISA asks for the impossible."""
    cubins: tuple[int, ...]
    """Architectures with machine code inside, e.g. 90 for sm_90."""


@dataclass(frozen=True)
class Missing:
    """There is no library to use."""

    reason: str
    """One line that says why and the way out."""


@cache
def load_library() -> Library | Missing:
    """The library of this installation, with its operators registered, or why there is none."""
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        return Missing(
            f"{NAME} is not installed; `pip install .` builds it where a C++ compiler is "
            "(`make setup` in a checkout)"
        )
    return open_library(spec.origin)


def open_library(path: str) -> Library | Missing:
    """Loads the file, whose operators must not be registered yet."""
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        library = ctypes.CDLL(path)
        schema = int(library.querypatch_schema())
    except (OSError, AttributeError) as error:
        return Missing(f"{path} cannot be loaded ({error}); build it again with `pip install .`")
    if schema != SCHEMA:
        return Missing(
            f"{path} has schema {schema}, this querypatch expects {SCHEMA}; "
            "build it again with `pip install .`"
        )
    library.querypatch_cpu_isa.restype = ctypes.c_char_p
    nvrtc.lend_compiler(library)
    numbers = range(library.querypatch_num_cubins())
    return Library(
        path=path,
        cpu_isa=library.querypatch_cpu_isa().decode(),
        cubins=tuple(library.querypatch_cubin_architecture(number) for number in numbers),
    )
