"""What is trained, and how strongly: norms of the gradients by the public names."""

import json
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity.case import GRADIENT_TOLERANCE, Case, Finding, compare_values

_FLOOR = 1e-4


def trained_finding(case: Case, model: nn.Module, name_of: Callable[[str], str]) -> Finding:
    """Tensors that are trained by one side only; `name_of` gives the first of their names."""
    assert case.manifest is not None
    wanted = {
        name
        for name, entry in json.loads(case.manifest.read_text()).items()
        if entry.get("requires_grad") and not entry.get("alias_of")
    }
    ours = {name_of(name) for name, tensor in model.named_parameters() if tensor.requires_grad}
    odd = sorted(wanted ^ ours)
    return Finding(
        "trained tensors", float(len(odd)), 0, ", ".join(odd[:3]) or "all as they should be"
    )


def compare_gradients(
    case: Case, model: nn.Module, totals: Mapping[str, Tensor], name_of: Callable[[str], str]
) -> Iterator[Finding]:
    """Norms per tensor of the gradients of each total whose array, its key, the case has."""
    names = case.arrays["grad_names"].tolist()
    for array, total in totals.items():
        if array not in case.arrays:
            continue
        model.zero_grad()
        torch.autograd.backward(total, retain_graph=True)
        norms = {
            name_of(name): 0.0 if tensor.grad is None else float(tensor.grad.norm())
            for name, tensor in model.named_parameters()
            if tensor.requires_grad
        }
        for name, expected in zip(names, case.arrays[array], strict=True):
            got = np.asarray(norms.get(name, np.nan))
            where = f"{array} of {name}"
            yield compare_values("gradients", where, got, expected, GRADIENT_TOLERANCE, _FLOOR)
        for name in case.zero_gradients:
            yield Finding("zero gradients", norms[name], GRADIENT_TOLERANCE, f"{array} of {name}")
