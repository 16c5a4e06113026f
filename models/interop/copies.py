"""Tensors that public files hold under several names: a head, once for each way to reach it.

Copies must agree when a file comes in, and are written again when it goes out, so that the public
code's strict loading fits.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from models.interop.checkpoint_files import WeightsError


def without_copies(
    tensors: Mapping[str, Tensor],
    our_name: Callable[[str], str],
    *,
    left_out: Sequence[str],
    source: str,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Public tensors by our names, each once, and the public names that only repeat others.

    `left_out` are shell patterns of public names without a use here.

    Raises:
        WeightsError: tensors that should be copies of each other are not.
    """
    named: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    repeated: list[str] = []
    for theirs, tensor in tensors.items():
        if any(fnmatch.fnmatchcase(theirs, pattern) for pattern in left_out):
            continue
        ours = our_name(theirs)
        if ours not in named:
            named[ours], first[ours] = tensor, theirs
            continue
        if not torch.equal(named[ours], tensor):
            raise WeightsError(
                f"{source}: {theirs} must be a copy of {first[ours]} and is not; "
                "the file is damaged or was put together wrongly, fetch it again"
            )
        repeated.append(theirs)
    return named, tuple(repeated)


def repeated_note(repeated: Sequence[str]) -> tuple[str, ...]:
    """What a report says of names that only repeat others; nothing where there are none."""
    if not repeated:
        return ()
    parts = sorted({name.partition("_embed")[0] + "_embed" for name in repeated})
    return (
        f"{len(repeated)} tensors of the file are copies under further names, and agree: "
        f"{', '.join(parts)}",
    )
