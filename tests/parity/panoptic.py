"""Parity of the mask head in its second stage: masks, their losses and gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.detector import Detector
from models.interop.panoptic import load_panoptic, panoptic_name, panoptic_settings
from models.mask_head import MaskHeadSettings, MaskSource, MatchedMasks, PanopticDetector
from models.mask_losses import MaskLossWeights, mask_losses
from models.structures import GroupOutput, Images, Losses
from tests.parity import formula
from tests.parity.case import Case, Finding, NotSupportedError, compare
from tests.parity.criterion import (
    compare_losses,
    compare_matching,
    costs_of,
    criterion_losses,
    decoder_outputs,
    targets_of,
)
from tests.parity.detector import (
    Run,
    Watch,
    confirmed,
    images_of,
    intermediates,
    tensors_of,
)
from tests.parity.gradients import compare_gradients, trained_finding

_SHOWN = 4
"""Queries whose masks and attention are stored in full."""


def run_panoptic(case: Case) -> Iterator[Finding]:
    """A frozen DETR with a mask head."""
    model = _model(case)
    images = images_of(case)
    yield trained_finding(case, model, panoptic_name)
    with torch.no_grad(), Watch(model.detector) as watch:
        source = model.detect(images)
        run = Run(source.detection, watch.queries, watch.projected)
    yield from intermediates(case, model.detector, images, run)
    (group,) = source.detection.groups
    if not case.config["aux_loss"]:
        group = GroupOutput(group.name, group.layers[-1:])
    for number, layer in enumerate(group.layers):
        prefix = "" if number == len(group.layers) - 1 else f"aux_{number}_"
        yield from compare("outputs", f"{prefix}pred_logits", layer.logits, case)
        yield from compare("outputs", f"{prefix}pred_boxes", layer.boxes, case)
    yield from _masks(case, model, source)
    if "targets" in case.inputs:
        yield from _training(case, model, images, group)


def _model(case: Case) -> PanopticDetector:
    config = case.config
    if not config["freeze_detector"]:
        raise NotSupportedError("a mask head that is trained together with its detector")
    tensors = tensors_of(case)
    inferred, _ = panoptic_settings(tensors, source="formula", dilation=config["dilation"])
    head = MaskHeadSettings(softmax_over=config["mask_attention_softmax_over"])
    detector = Detector(confirmed(case, inferred), torch.Generator())
    model = PanopticDetector(detector, head, torch.Generator())
    load_panoptic(model, tensors, source=case.name)
    return model.train(config["mode"] == "train")


@torch.no_grad()
def _masks(case: Case, model: PanopticDetector, source: MaskSource) -> Iterator[Finding]:
    """The masks of all queries, those of a picture at a time."""
    shown = source.attention[:, :_SHOWN]
    yield from compare("intermediates", f"bbox_attention_first{_SHOWN}", shown, case)
    masks = torch.stack([_masks_of(model, source, n) for n in range(len(source.attention))])
    yield from compare("outputs", f"pred_masks_first{_SHOWN}", masks[:, :_SHOWN], case)
    yield from compare("outputs", "pred_masks_mean", masks.mean((2, 3)), case)
    yield from compare("outputs", "pred_masks_std", masks.std((2, 3), correction=0), case)


def _masks_of(model: PanopticDetector, source: MaskSource, picture: int) -> Tensor:
    queries = torch.arange(source.attention.shape[1])
    return model.masks(source, torch.full_like(queries, picture), queries)


def _training(
    case: Case, model: PanopticDetector, images: Images, group: GroupOutput
) -> Iterator[Finding]:
    """Matching, losses and, of a case in training, gradients."""
    targets = targets_of(case.inputs["targets"])
    yield from compare_matching(case, decoder_outputs(group.layers), targets)
    found: MatchedMasks = model(images, targets, costs_of(case.config))
    weights = MaskLossWeights(
        focal=float(case.config["mask_loss_coef"]), dice=float(case.config["dice_loss_coef"])
    )
    num_targets = sum(len(labels) for labels in targets.labels)
    of_masks = mask_losses(found, _wanted(case, found, images), num_targets, weights)
    of_boxes = criterion_losses(case, group, targets)
    terms = {**of_boxes.terms, **of_masks.terms}
    losses = Losses(of_boxes.total + of_masks.total, terms)
    yield from compare_losses(case, losses)
    if model.training:
        yield from compare_gradients(case, model, {"grad_norms": losses.total}, panoptic_name)


def _wanted(case: Case, found: MatchedMasks, images: Images) -> Tensor:
    """The true masks of the matched pairs, which overlap in these cases, padded as the pictures."""
    rows, columns = images.padding.shape[1:]
    matching = found.matching
    wanted = torch.zeros(len(matching.picture), rows, columns, dtype=torch.bool)
    pairs = zip(matching.picture.tolist(), matching.target.tolist(), strict=True)
    for mask, (picture, target) in zip(wanted, pairs, strict=True):
        described = case.inputs["targets"][picture]["masks"]
        height, width = described["height"], described["width"]
        made = formula.picture(described["names"][target], height, width)[0] > 0
        mask[:height, :width] = torch.from_numpy(made)
    return wanted
