"""Parity of Deformable DETR and Sparse DETR: forward, selections, matching, losses, gradients.

The models run as in training, where Sparse DETR's encoder has its heads; nothing is dropped, so
that a case in evaluation differs in its gradients alone, and its outputs are compared twice.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from models.detection_losses import Supervision, detection_losses, supervision_of
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.deformable import layout_of, load_deformable, public_names
from models.interop.deformable_settings import deformable_settings
from models.losses import LossWeights
from models.structures import (
    DetectorOutput,
    GroupOutput,
    Images,
    LayerOutput,
    Losses,
    SampledAttention,
    Targets,
)
from tests.parity.case import Case, Finding, NotSupportedError, compare
from tests.parity.criterion import (
    compare_losses,
    compare_matching,
    costs_of,
    decoder_outputs,
    targets_of,
)
from tests.parity.detector import confirm, images_of, tensors_of
from tests.parity.gradients import compare_gradients, trained_finding
from tests.parity.tokens import (
    Order,
    TokenWatch,
    compare_cells,
    compare_encoder_heads,
    compare_proposals,
    compare_selection,
    proposal_order,
    reordered_tokens,
    selection_order,
)

_PUBLIC_BACKBONES = {"swin_t": "swin-t"}


def run_deformable(case: Case) -> Iterator[Finding]:
    """A Deformable or Sparse DETR."""
    tensors = tensors_of(case)
    settings = _settings(case, tensors)
    model = Detector(settings, torch.Generator())
    load_deformable(model, tensors, source=case.name)
    images = images_of(case)
    layout = layout_of(settings)
    yield trained_finding(case, model, lambda ours: public_names(ours, layout)[0])
    trains = case.config["mode"] == "train"
    if not trains:
        yield from _in_evaluation(case, model, images)
    model.train()
    with torch.set_grad_enabled(trains), TokenWatch(model) as watch:
        output = model(images, record="cross")
    queries, sets_of_queries = proposal_order(case, model, output.memory)
    selected, sets_of_tokens = selection_order(case, output.memory)
    yield from (*sets_of_queries, *sets_of_tokens)
    yield from compare_cells(case, model, images, watch, output.memory)
    yield from compare_proposals(case, model, output.memory)
    yield from compare_selection(case, watch, output, selected)
    yield from compare_encoder_heads(case, output.memory, selected)
    yield from _decoder(case, _reordered(output.groups[0].layers, queries), watch, queries)
    if "targets" in case.inputs:
        yield from _training(case, model, output, queries, selected)


def _settings(case: Case, tensors: dict[str, Tensor]) -> DetectorSettings:
    config = case.config
    if config["dropout"] or config.get("backbone_from_scratch"):
        raise NotSupportedError("dropout, or a backbone whose BatchNorms are trained")
    assert case.manifest is not None
    trained = [
        key
        for key, entry in json.loads(case.manifest.read_text()).items()
        if key.startswith("backbone.") and entry.get("requires_grad")
    ]
    settings, _ = deformable_settings(
        tensors, source=case.name, arguments=config, train_backbone=bool(trained)
    )
    confirm(case, _told(settings))
    backbone = settings.backbone.model_copy(
        update={"frozen_precision": "float32", "drop_path": 0.0}
    )
    public = {"legacy_dam": True, "legacy_padding": True}
    selection = settings.selection.model_copy(update=public)
    changes = {"dropout": 0.0, "backbone": backbone, "selection": selection}
    return settings.model_copy(update=changes)


def _told(settings: DetectorSettings) -> dict[str, object]:
    """The case's config as the settings say it; keys that a case does not have say nothing."""
    told: dict[str, object] = {
        "backbone": _PUBLIC_BACKBONES.get(settings.backbone.name, settings.backbone.name),
        "dilation": settings.backbone.dilation,
        "position_embedding": settings.position,
        "num_feature_levels": settings.feature_levels,
        "enc_layers": settings.encoder_layers,
        "dec_layers": settings.decoder_layers,
        "dim_feedforward": settings.feedforward_dim,
        "hidden_dim": settings.hidden_dim,
        "nheads": settings.num_heads,
        "num_queries": settings.num_queries,
        "enc_n_points": settings.encoder_points,
        "dec_n_points": settings.decoder_points,
        "two_stage": settings.two_stage,
        "num_classes": settings.num_classes,
        "rho": settings.rho or 0,
    }
    if settings.two_stage:
        told["eff_query_init"] = settings.proposal_content == "memory"
        told["eff_specific_head"] = settings.proposal_classes == "all"
    else:
        told["with_box_refine"] = settings.box_refinement
    if settings.rho is not None and settings.encoder_layers > 1:
        told["use_enc_aux_loss"] = settings.selection.encoder_auxiliary
    return told


@torch.no_grad()
def _in_evaluation(case: Case, model: Detector, images: Images) -> Iterator[Finding]:
    """The outputs without what only training needs."""
    model.eval()
    output = model(images)
    queries, _ = proposal_order(case, model, output.memory)
    yield from _outputs(case, "evaluation", _reordered(output.groups[0].layers, queries))


def _decoder(
    case: Case, layers: tuple[LayerOutput, ...], watch: TokenWatch, queries: Order
) -> Iterator[Finding]:
    yield from _outputs(case, "outputs", layers)
    group = "intermediates"
    hidden = torch.stack([layer.hidden for layer in layers])
    yield from compare(group, "decoder_hidden_first4", hidden[:, :, :4], case)
    first = layers[0].reference
    assert first is not None
    yield from compare(group, "decoder_init_reference", first, case)
    refined = watch.detector.settings.box_refinement
    references = [layer.boxes if refined else layer.reference for layer in layers]
    after = torch.stack([one for one in references if one is not None])
    yield from compare(group, "decoder_references", after, case)
    looks = [layer.cross_attention for layer in layers]
    sampled = [look for look in looks if isinstance(look, SampledAttention)]
    for name, values in (
        ("sampling_locations_dec_first2", [look.locations[:, :2] for look in sampled]),
        ("attention_weights_dec_first2", [look.weights[:, :2] for look in sampled]),
    ):
        yield from compare(group, name, torch.stack(values, dim=1), case)


def _outputs(case: Case, group: str, layers: tuple[LayerOutput, ...]) -> Iterator[Finding]:
    for output, layer in decoder_outputs(layers).items():
        prefix = "" if output == "last" else f"{output}_"
        yield from compare(group, f"{prefix}pred_logits", layer.logits, case)
        yield from compare(group, f"{prefix}pred_boxes", layer.boxes, case)


def _training(
    case: Case, model: Detector, output: DetectorOutput, queries: Order, selected: Order
) -> Iterator[Finding]:
    """Matching, losses and, of a case in training, gradients."""
    targets = targets_of(case.inputs["targets"])
    supervision = supervision_of(model.settings)
    memory = output.memory
    layers = _reordered(output.groups[0].layers, queries)
    yield from compare_matching(case, decoder_outputs(layers), targets, "sigmoid")
    tokens = {
        f"aux_enc_{number}": reordered_tokens(said, selected)
        for number, said in enumerate(memory.encoder_layers)
    }
    yield from compare_matching(case, tokens, targets, "sigmoid")
    if memory.proposals is not None:
        binary = Targets(targets.boxes_cxcywh, tuple(map(torch.zeros_like, targets.labels)))
        wanted = binary if supervision.proposal_classes == "binary" else targets
        yield from compare_matching(case, {"enc": memory.proposals}, wanted, "sigmoid")
    config = case.config
    boxes = {
        "boxes_l1": float(config["bbox_loss_coef"]),
        "giou": float(config["giou_loss_coef"]),
    }
    classes = {
        "classes": float(config["cls_loss_coef"]),
        "focal_alpha": float(config["focal_alpha"]),
    }
    selection = float(config.get("mask_prediction_coef", 0.0))
    nothing = {"classes": 0.0, "boxes_l1": 0.0, "giou": 0.0}
    weights = {
        "grad_norms": LossWeights(**boxes, **classes, selection=selection),
        "grad_norms_boxes": LossWeights(**boxes, classes=0.0, selection=0.0),
        "grad_norms_mask_prediction": LossWeights(**nothing, selection=selection),
    }
    losses = {
        array: _losses(case, output, targets, weight, supervision)
        for array, weight in weights.items()
        if array == "grad_norms" or array in case.arrays
    }
    yield from compare_losses(case, losses["grad_norms"])
    if case.config["mode"] == "train":
        layout = layout_of(model.settings)
        totals = {array: loss.total for array, loss in losses.items()}
        yield from compare_gradients(
            case, model, totals, lambda ours: public_names(ours, layout)[0]
        )


def _losses(
    case: Case,
    output: DetectorOutput,
    targets: Targets,
    weights: LossWeights,
    supervision: Supervision,
) -> Losses:
    """Our losses; with aux_loss off all terms, and the total of those that are left."""
    costs = costs_of(case.config)
    losses = detection_losses(output, targets, weights, costs, supervision)
    if case.config["aux_loss"]:
        return losses
    left = detection_losses(_without_auxiliary(case, output), targets, weights, costs, supervision)
    return replace(losses, total=left.total)


def _without_auxiliary(case: Case, output: DetectorOutput) -> DetectorOutput:
    """The last decoder layer alone, which looks where all of them look, for the DAM.

    Without proposals where their terms have no weight either, as in Deformable DETR.
    """
    (group,) = output.groups
    looks = [layer.cross_attention for layer in group.layers]
    sampled = [look for look in looks if isinstance(look, SampledAttention)]
    everywhere = SampledAttention(
        torch.cat([look.locations for look in sampled], dim=4),
        torch.cat([look.weights for look in sampled], dim=4),
    )
    last = replace(group.layers[-1], cross_attention=everywhere)
    memory = output.memory
    if not case.loss_weights.get("loss_ce_enc"):
        memory = replace(memory, proposals=None)
    return DetectorOutput((GroupOutput(group.name, (last,)),), memory)


def _reordered(layers: tuple[LayerOutput, ...], order: Order) -> tuple[LayerOutput, ...]:
    """The queries as the reference numbers them."""
    if order is None:
        return layers
    rows = torch.arange(len(order))[:, None]
    return tuple(
        replace(
            layer,
            hidden=layer.hidden[rows, order],
            logits=layer.logits[rows, order],
            boxes=layer.boxes[rows, order],
            reference=None if layer.reference is None else layer.reference[rows, order],
            cross_attention=None
            if not isinstance(layer.cross_attention, SampledAttention)
            else SampledAttention(
                layer.cross_attention.locations[rows, order],
                layer.cross_attention.weights[rows, order],
            ),
        )
        for layer in layers
    )
