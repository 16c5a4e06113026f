"""A parity case as it lies on disk, and what comes of comparing with it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

OUTPUT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
LOSS_FLOOR = 0.1
"""Below this a loss is compared absolutely: 1e-5 of 0.1 is the floor of 1e-6."""
GRADIENT_TOLERANCE = 2e-3


_SERVING = {
    *("loss_names", "loss_values", "loss_weights", "loss_total", "loss_boxes_total"),
    *("grad_names", "grad_norms", "grad_norms_boxes", "grad_norms_mask_prediction"),
    *("grad_norm_total",),
    *("keep", "order", "pred_feature_queries"),
}
"""Arrays that are read together or that describe others."""


class NotSupportedError(Exception):
    """A case of a model, or with an option, that this project does not have yet."""


@dataclass(frozen=True)
class Case:
    """What was run (the json) and what came out (the npz)."""

    name: str
    model: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    loss_weights: Mapping[str, float]
    zero_gradients: tuple[str, ...]
    """Trained tensors whose gradient is zero in exact arithmetic."""
    manifest: Path | None
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Finding:
    """How far one quantity is from the reference, in the measure of its tolerance."""

    group: str
    error: float
    tolerance: float
    where: str
    """Name of the quantity, of the array where it is one of the case's, and the place in it."""

    @property
    def misses(self) -> bool:
        """True where the tolerance is not kept; NaN never keeps it."""
        return not self.error <= self.tolerance


def find_cases(folder: Path) -> tuple[Path, ...]:
    """The json files of a folder's cases, by name; ValueError where there are none."""
    found = tuple(sorted((folder / "cases").glob("*.json")))
    if not found:
        raise ValueError(
            f"no cases/*.json in {folder}; give the folder that holds cases/ and manifests/"
        )
    return found


def read_case(path: Path) -> Case:
    """One case; its arrays lie beside it, its manifest is named relative to the folder above."""
    described = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = dict(stored)
    manifest = described.get("manifest")
    return Case(
        name=path.stem,
        model=described["model"],
        config=described["config"],
        inputs=described["inputs"],
        loss_weights=described.get("loss_weights", {}),
        zero_gradients=(
            *described.get("margins", {}).get("gradients_zero_up_to_rounding", ()),
            *described.get("checks", {}).get("grad_norms_zero_up_to_rounding", ()),
        ),
        manifest=path.parents[1] / manifest if manifest else None,
        arrays=arrays,
    )


def compare(
    group: str, name: str, got: Tensor | np.ndarray, case: Case, tolerance: float = OUTPUT_TOLERANCE
) -> Iterator[Finding]:
    """The largest absolute difference from an array of the case, if it has it, and its place."""
    if name in case.arrays:
        yield compare_values(group, name, got, case.arrays[name], tolerance)


def compare_values(
    group: str,
    name: str,
    got: Tensor | np.ndarray,
    expected: np.ndarray,
    tolerance: float,
    floor: float | None = None,
) -> Finding:
    """The largest difference and its place; with `floor` relative to max(expected, floor).

    NaN differs from every number and is like NaN: a ratio whose whole is nothing.
    """
    values = got.detach().numpy() if isinstance(got, Tensor) else got
    if values.shape != expected.shape:
        shapes = f"{name}: shape {values.shape}, expected {expected.shape}"
        return Finding(group, np.inf, tolerance, shapes)
    if not expected.size:
        return Finding(group, 0.0, tolerance, name)
    difference = np.abs(values.astype(np.float64) - expected.astype(np.float64))
    if floor is not None:
        difference /= np.maximum(np.abs(expected), floor)
    alike = np.isnan(values) & np.isnan(expected)
    difference = np.where(alike, 0.0, np.nan_to_num(difference, nan=np.inf))
    place = np.unravel_index(difference.argmax(), difference.shape)
    where = f"{name}{[int(i) for i in place]}" if place else name
    return Finding(group, float(difference[place]), tolerance, where)


def never_compared(case: Case, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Arrays of the case that no finding is about, so that a gap is seen."""
    compared = {finding.where.partition("[")[0] for finding in findings}
    return tuple(
        name
        for name in case.arrays
        if name not in compared and name not in _SERVING and not name.startswith("input_")
    )


def worst_by_group(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Of each group, in order of appearance, the finding that is farthest from its tolerance."""
    worst: dict[str, Finding] = {}
    for finding in findings:
        known = worst.get(finding.group)
        if known is None or _excess(finding) > _excess(known):
            worst[finding.group] = finding
    return tuple(worst.values())


def _excess(finding: Finding) -> float:
    if finding.tolerance:
        return finding.error / finding.tolerance
    return np.inf if finding.error else 0.0
