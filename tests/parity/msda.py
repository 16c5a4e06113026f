"""Parity of the operator of deformable attention alone, in float64."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from models.ops.deformable import deformable_attention
from tests.parity import formula
from tests.parity.case import Case, Finding, NotSupportedError, compare

OPERATOR_TOLERANCE = 1e-10

_INPUTS = {"note", "value", "sampling_locations", "attention_weights", "grad_output"}


def run_operator(case: Case) -> Iterator[Finding]:
    """The output and all gradients, of inputs made by formula."""
    unknown = set(case.inputs) - _INPUTS
    if unknown or case.config.get("dtype", "float64") != "float64":
        raise NotSupportedError(f"inputs {sorted(unknown)} or dtype of an operator case")
    shapes = tuple((rows, columns) for rows, columns in case.config["levels"])
    value = _drawn(case.inputs["value"]).requires_grad_()
    described = case.inputs["sampling_locations"]
    locations = (0.5 + described["scale"] * _drawn(described)).requires_grad_()
    logits = _drawn(case.inputs["attention_weights"])
    weights = logits.flatten(3).softmax(-1).view(logits.shape).requires_grad_()
    yield from compare("inputs", "sampling_locations", locations, case, OPERATOR_TOLERANCE)
    yield from compare("inputs", "attention_weights", weights, case, OPERATOR_TOLERANCE)
    out = deformable_attention(value, shapes, locations, weights)
    yield from compare("output", "output", out, case, OPERATOR_TOLERANCE)
    torch.autograd.backward(out, _drawn(case.inputs["grad_output"]))
    for name, tensor in (
        ("value", value),
        ("sampling_locations", locations),
        ("attention_weights", weights),
    ):
        assert tensor.grad is not None
        yield from compare("gradients", f"grad_{name}", tensor.grad, case, OPERATOR_TOLERANCE)


def _drawn(described: Mapping[str, Any]) -> Tensor:
    shape = tuple(described["shape"])
    return torch.from_numpy(formula._normal(described["name"], shape)).double()
