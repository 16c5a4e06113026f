"""Parity of Conditional DETR and DAB-DETR: forward, matching, losses, gradients, found boxes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from models import set_sums
from models.detection_losses import detection_losses, supervision_of
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.conditional import conditional_settings, load_conditional, public_names
from models.losses import LossWeights
from models.postprocess import detections
from models.structures import DetectorOutput, GroupOutput, LayerOutput, Losses, Targets
from tests.parity.case import Case, Finding, NotSupportedError, compare
from tests.parity.criterion import (
    compare_losses,
    compare_matching,
    costs_of,
    decoder_outputs,
    targets_of,
)
from tests.parity.detector import Run, Watch, confirm, images_of, intermediates, tensors_of
from tests.parity.gradients import compare_gradients, trained_finding

_LOGGED_HALVES = ("loss_xy", "loss_hw")
"""The two halves of `loss_bbox`, which DAB-DETR's code logs as well."""


def run_conditional(case: Case) -> Iterator[Finding]:
    """A Conditional DETR or DAB-DETR."""
    tensors = tensors_of(case)
    settings = _settings(case, tensors)
    model = Detector(settings, torch.Generator())
    load_conditional(model, tensors, source=case.name)
    model.train(case.config["mode"] == "train")
    images = images_of(case)
    with torch.set_grad_enabled(model.training), Watch(model) as watch:
        run = Run(model(images), watch.queries, watch.projected)

    def name_of(ours: str) -> str:
        return public_names(ours, anchors=settings.query_kind == "anchor")[0]

    yield trained_finding(case, model, name_of)
    yield from intermediates(case, model, images, run)
    layers = run.output.groups[0].layers
    yield from _references(case, layers)
    for output, layer in decoder_outputs(layers).items():
        prefix = "" if output == "last" else f"{output}_"
        yield from compare("outputs", f"{prefix}pred_logits", layer.logits, case)
        yield from compare("outputs", f"{prefix}pred_boxes", layer.boxes, case)
    if "post_queries" in case.arrays:
        yield from _postprocess(case, settings)
    if "targets" in case.inputs:
        targets = targets_of(case.inputs["targets"])
        yield from compare_matching(case, decoder_outputs(layers), targets, "sigmoid")
        losses = _losses(case, run.output, targets, settings, classes=True)
        yield from compare_losses(_without_halves(case), losses)
        if model.training:
            boxes = _losses(case, run.output, targets, settings, classes=False)
            totals = {"grad_norms_boxes": boxes.total, "grad_norms": losses.total}
            yield from compare_gradients(case, model, totals, name_of)


def _settings(case: Case, tensors: dict[str, Tensor]) -> DetectorSettings:
    config = case.config
    if config["dropout"] or config["pre_norm"]:
        raise NotSupportedError("dropout, or pre_norm")
    arguments = {
        **config,
        "pe_temperatureH": config.get("pe_temperature_h"),
        "pe_temperatureW": config.get("pe_temperature_w"),
    }
    settings, _ = conditional_settings(
        tensors, source=case.name, arguments=arguments, train_backbone=config["train_backbone"]
    )
    confirm(case, _told(settings))
    backbone = settings.backbone.model_copy(update={"frozen_precision": "float32"})
    return settings.model_copy(update={"dropout": 0.0, "backbone": backbone})


def _told(settings: DetectorSettings) -> dict[str, object]:
    anchors = settings.query_kind == "anchor"
    told: dict[str, object] = {
        "backbone": settings.backbone.name,
        "dilation": settings.backbone.dilation,
        "position_embedding": settings.position,
        "enc_layers": settings.encoder_layers,
        "dec_layers": settings.decoder_layers,
        "dim_feedforward": settings.feedforward_dim,
        "hidden_dim": settings.hidden_dim,
        "nheads": settings.num_heads,
        "num_queries": settings.num_queries,
        "num_classes": settings.num_classes,
        "activation": settings.activation,
        "num_patterns": settings.num_patterns,
        "inverse_sigmoid_eps": 1e-3 if anchors else 1e-5,
    }
    return told | ({"query_dim": 4, "iter_update": True} if anchors else {})


def _references(case: Case, layers: tuple[LayerOutput, ...]) -> Iterator[Finding]:
    references = [layer.reference for layer in layers]
    known = torch.stack([one for one in references if one is not None])
    yield from compare("intermediates", "reference_points", known[0], case)
    yield from compare("intermediates", "decoder_references", known, case)


def _losses(
    case: Case,
    output: DetectorOutput,
    targets: Targets,
    settings: DetectorSettings,
    *,
    classes: bool,
) -> Losses:
    config = case.config
    weights = LossWeights(
        classes=float(config["cls_loss_coef"]) if classes else 0.0,
        boxes_l1=float(config["bbox_loss_coef"]),
        giou=float(config["giou_loss_coef"]),
        focal_alpha=float(config["focal_alpha"]),
        focal_gamma=float(config["focal_gamma"]),
    )
    if not config["aux_loss"]:
        (group,) = output.groups
        output = replace(output, groups=(GroupOutput(group.name, group.layers[-1:]),))
    with mock.patch.object(set_sums, "generalized_iou_pairs", _public_giou(case)):
        return detection_losses(
            output, targets, weights, costs_of(config), supervision_of(settings)
        )


def _public_giou(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """DAB-DETR's code divides by areas plus 1e-6; with small boxes that is over a tolerance."""
    epsilon = float(case.config.get("giou_eps", 0.0))

    def overlap(boxes: Tensor, others: Tensor) -> Tensor:
        areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (boxes, others)]
        far = torch.maximum(boxes[..., 2:], others[..., 2:])
        near = torch.minimum(boxes[..., 2:], others[..., 2:])
        hull = (far - torch.minimum(boxes[..., :2], others[..., :2])).prod(-1)
        shared = (near - torch.maximum(boxes[..., :2], others[..., :2])).clamp(min=0).prod(-1)
        union = areas[0] + areas[1] - shared
        return shared / (union + epsilon) - (hull - union) / (hull + epsilon)

    return overlap


def _without_halves(case: Case) -> Case:
    ours = [not str(name).startswith(_LOGGED_HALVES) for name in case.arrays["loss_names"]]
    kept = {name: case.arrays[name][ours] for name in ("loss_names", "loss_values")}
    return replace(case, arrays={**case.arrays, **kept})


def _postprocess(case: Case, settings: DetectorSettings) -> Iterator[Finding]:
    """Pairs of a query and a label as sets: some scores are nearly equal."""
    logits, boxes = (torch.from_numpy(case.arrays[f"pred_{kind}"]) for kind in ("logits", "boxes"))
    sizes = torch.tensor(case.config["original_sizes"])
    count = case.arrays["post_scores"].shape[1]
    said = LayerOutput(boxes, logits, boxes)
    found = detections(said, sizes, settings.class_scores, count)
    yield Finding("post-processing", abs(count - settings.max_pairs), 0, "post_scores (how many)")
    sides = sizes[:, None, [1, 0, 1, 0]].numpy()
    all_boxes = detections(LayerOutput(boxes, boxes, boxes), sizes, "softmax").boxes_xyxy
    queries = torch.cdist(found.boxes_xyxy, all_boxes).argmin(-1).numpy()
    labels, expected = found.labels.numpy(), case.arrays
    for picture in range(len(sizes)):
        pairs = set(zip(queries[picture], labels[picture], strict=True))
        theirs = zip(
            expected["post_queries"][picture], expected["post_labels"][picture], strict=True
        )
        odd = float(len(pairs ^ set(theirs)))
        yield Finding("post-processing", odd, 0, f"post_queries[{picture}]")
        yield Finding("post-processing", odd, 0, f"post_labels[{picture}]")
    by_score = torch.from_numpy(expected["post_scores"]).sort(dim=1, descending=True).values
    far = float((found.scores - by_score).abs().max())
    yield Finding("post-processing", far, 1e-6, "post_scores")
    yield _boxes_finding(found.boxes_xyxy.numpy() / sides, expected["post_boxes"] / sides)


def _boxes_finding(ours: np.ndarray, theirs: np.ndarray) -> Finding:
    """Relative to the picture, each box with the nearest of the other side."""
    distance = np.abs(ours[:, :, None] - theirs[:, None]).max(-1)
    far = max(distance.min(1).max(), distance.min(2).max())
    return Finding("post-processing", float(far), 1e-6, "post_boxes")
