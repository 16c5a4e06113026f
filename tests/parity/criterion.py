"""Parity of the set criterion and of post-processing, without a network."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.losses import LossWeights, Reconstruction, set_losses
from models.matching import ClassScores, MatchingCosts, match
from models.postprocess import detections
from models.structures import GroupOutput, LayerOutput, Losses, Targets, TokenPredictions
from tests.parity import formula
from tests.parity.case import (
    LOSS_FLOOR,
    LOSS_TOLERANCE,
    OUTPUT_TOLERANCE,
    Case,
    Finding,
    NotSupportedError,
    compare,
    compare_values,
)

_CRITERION_INPUTS = {
    *("name", "images", "queries", "logits", "layers", "logits_scale"),
    *("pred_logits", "pred_boxes", "targets"),
}


def run_criterion(case: Case) -> Iterator[Finding]:
    """The losses, matchings and gradients of predictions made by formula."""
    unknown = set(case.inputs) - _CRITERION_INPUTS
    if unknown:
        raise NotSupportedError(f"inputs {sorted(unknown)} of a criterion case")
    last = case.inputs["layers"] - 1
    logits = [_logits(case, layer).requires_grad_() for layer in range(last + 1)]
    boxes = [_boxes(case, layer).requires_grad_() for layer in range(last + 1)]
    yield from compare("inputs", "input_pred_logits", logits[last], case)
    yield from compare("inputs", "input_pred_boxes", boxes[last], case)
    layers = tuple(LayerOutput(boxes[n], logits[n], boxes[n]) for n in range(last + 1))
    targets = targets_of(case.inputs["targets"])
    losses = criterion_losses(case, GroupOutput("queries", layers), targets)
    yield from compare_matching(case, decoder_outputs(layers), targets)
    yield from compare_losses(case, losses)
    torch.autograd.backward(losses.total)
    yield from _gradients(case, "pred_logits", logits)
    yield from _gradients(case, "pred_boxes", boxes)


def run_postprocess(case: Case) -> Iterator[Finding]:
    """Scores, labels and boxes; boxes relative to the side of the picture."""
    logits, boxes = (
        torch.from_numpy(case.arrays[f"input_pred_{kind}"]) for kind in ("logits", "boxes")
    )
    sizes = np.array(case.config["original_sizes"])
    found = detections(LayerOutput(boxes, logits, boxes), torch.from_numpy(sizes))
    yield from compare("scores", "scores", found.scores, case, 1e-6)
    yield from compare("labels", "labels", found.labels, case, 0)
    sides = sizes[:, None, [1, 0, 1, 0]]
    shown = found.boxes_xyxy.numpy() / sides
    yield compare_values("boxes", "boxes", shown, case.arrays["boxes"] / sides, 1e-6)


def criterion_losses(
    case: Case, group: GroupOutput, targets: Targets, reconstruction: Reconstruction | None = None
) -> Losses:
    """Our losses with the weights of the case; of the last layer alone where it has no others."""
    config = case.config
    weights = LossWeights(
        boxes_l1=float(config["bbox_loss_coef"]),
        giou=float(config["giou_loss_coef"]),
        features=float(config.get("feature_loss_coef", 0)),
        no_object=float(config["eos_coef"]),
    )
    return set_losses(group, targets, weights, costs_of(config), reconstruction=reconstruction)


def costs_of(config: Mapping[str, Any]) -> MatchingCosts:
    """The matching costs of a case."""
    return MatchingCosts(
        classes=float(config["set_cost_class"]),
        boxes_l1=float(config["set_cost_bbox"]),
        giou=float(config["set_cost_giou"]),
    )


def targets_of(descriptions: list[dict[str, Any]]) -> Targets:
    """The targets of all pictures."""
    boxes, labels = [], []
    for described in descriptions:
        made = formula.targets(described["name"], described["count"], described["num_classes"])
        boxes.append(torch.from_numpy(made[0]))
        label = torch.from_numpy(made[1])
        if "labels_set_to" in described:
            label = torch.full_like(label, described["labels_set_to"])
        labels.append(label)
    return Targets(tuple(boxes), tuple(labels))


def decoder_outputs(
    layers: tuple[LayerOutput, ...],
) -> dict[str, LayerOutput | TokenPredictions]:
    """The decoder layers by the names that a case gives them."""
    last = len(layers) - 1
    return {"last" if n == last else f"aux_{n}": layer for n, layer in enumerate(layers)}


def compare_matching(
    case: Case,
    outputs: Mapping[str, LayerOutput | TokenPredictions],
    targets: Targets,
    class_scores: ClassScores = "softmax",
) -> Iterator[Finding]:
    """The number of pairs, as (query, target), that only one side has."""
    for output, said in outputs.items():
        logits, boxes = said.logits.detach()[None], said.boxes.detach()[None]
        found = match(logits, boxes, targets, costs_of(case.config), class_scores)
        for picture in range(logits.shape[1]):
            name = f"match_{output}_image{picture}"
            if name not in case.arrays:
                continue
            here = found.picture == picture
            pairs = set(zip(found.query[here].tolist(), found.target[here].tolist(), strict=True))
            expected = set(zip(*case.arrays[name].tolist(), strict=True))
            yield Finding("matching", float(len(pairs ^ expected)), 0, name)


def compare_losses(case: Case, losses: Losses) -> Iterator[Finding]:
    """Every term of the reference by name, and the weighted total."""
    arrays = case.arrays
    for name, expected in zip(arrays["loss_names"].tolist(), arrays["loss_values"], strict=True):
        if name not in losses.terms:
            yield Finding("losses", np.inf, LOSS_TOLERANCE, f"{name} is missing")
            continue
        got = losses.terms[name].numpy()
        yield compare_values("losses", name, got, np.asarray(expected), LOSS_TOLERANCE, LOSS_FLOOR)
    total = losses.total.detach().reshape(1).numpy()
    yield compare_values("losses", "total", total, arrays["loss_total"], LOSS_TOLERANCE, LOSS_FLOOR)


def _gradients(case: Case, kind: str, inputs: list[Tensor]) -> Iterator[Finding]:
    """The last layer's gradient relative to its largest value; of the others norms by picture."""
    gradients = [
        torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in inputs
    ]
    expected = case.arrays[f"grad_{kind}"]
    scale = max(float(np.abs(expected).max()), 1e-12)
    name = f"grad_{kind}"
    yield compare_values(
        "gradients", name, gradients[-1] / scale, expected / scale, OUTPUT_TOLERANCE
    )
    for layer, gradient in enumerate(gradients[:-1]):
        name = f"aux_{layer}_grad_{kind}_norm"
        norms = gradient.flatten(1).norm(dim=1).numpy()
        yield compare_values("gradients", name, norms, case.arrays[name], OUTPUT_TOLERANCE, 1e-6)


def _logits(case: Case, layer: int) -> Tensor:
    inputs = case.inputs
    shape = (inputs["images"], inputs["queries"], inputs["logits"])
    values = formula.weight(f"{inputs['name']}.logits.{layer}", (int(np.prod(shape)),))
    return torch.from_numpy(np.float32(inputs["logits_scale"]) * values.reshape(shape))


def _boxes(case: Case, layer: int) -> Tensor:
    inputs = case.inputs
    made = [
        formula.targets(
            f"{inputs['name']}.boxes.{layer}.{picture}", inputs["queries"], inputs["logits"]
        )
        for picture in range(inputs["images"])
    ]
    return torch.from_numpy(np.stack([boxes for boxes, _ in made]))
