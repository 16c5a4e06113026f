"""Parity of DETR and UP-DETR, pretraining and finetuned: forward, matching, losses, gradients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.detr import detr_name, detr_settings, load_detr
from models.losses import LossWeights, Reconstruction, set_losses
from models.patch_queries import PatchDetector, PatchDraws, QueryPatches
from models.resnet import ResNet, run_stage, run_stem
from models.structures import (
    DetectorOutput,
    GroupOutput,
    Images,
    Losses,
    QueryGroup,
    Targets,
    padding_of,
)
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
from tests.parity.gradients import compare_gradients, trained_finding

_CORNER = (slice(0, 6), slice(0, 3), slice(0, 3))


@dataclass(frozen=True)
class Run:
    """What our model said, and what passed between its parts."""

    output: DetectorOutput
    queries: QueryGroup
    projected: Tensor
    reconstruction: Reconstruction | None = None
    patch_queries: Tensor | None = None


def run_detector(case: Case) -> Iterator[Finding]:
    """A DETR."""
    tensors = tensors_of(case)
    settings = _settings(case, tensors)
    model = Detector(settings, torch.Generator())
    load_detr(model, tensors, source=case.name)
    model.train(case.config["mode"] == "train")
    images = images_of(case)
    with torch.set_grad_enabled(model.training), Watch(model) as watch:
        run = Run(model(images), watch.queries, watch.projected)
    yield from _findings(case, model, model, images, run)


def run_patch_detector(case: Case) -> Iterator[Finding]:
    """UP-DETR in pretraining."""
    config = case.config
    tensors = tensors_of(case)
    settings = _settings(case, tensors)
    patches = QueryPatches(
        num_patches=config["num_patches"],
        mask_ratio=float(config["mask_ratio"]),
        shuffle=config["query_shuffle"],
        reconstruction=config["feature_recon"],
        detach_features=False,
    )
    model = PatchDetector(settings, patches, torch.Generator())
    load_detr(model, tensors, source=case.name)
    model.train(config["mode"] == "train")
    images = images_of(case)
    with torch.set_grad_enabled(model.training), Watch(model.detector) as watch:
        said = model(images, _patches(case), _draws(case))
        flat_features = said.patch_features.flatten(0, 1)
        run = Run(
            said.detection,
            watch.queries,
            watch.projected,
            reconstruction=None
            if said.reconstructions is None
            else Reconstruction(said.reconstructions, said.patch_features),
            patch_queries=model.patch_projection(flat_features),
        )
    yield from _findings(case, model, model.detector, images, run)
    yield from _patch_findings(case, run, flat_features)


def _findings(
    case: Case, model: nn.Module, detector: Detector, images: Images, run: Run
) -> Iterator[Finding]:
    yield trained_finding(case, model, detr_name)
    yield from intermediates(case, detector, images, run)
    (group,) = run.output.groups
    if not case.config["aux_loss"]:
        group = GroupOutput(group.name, group.layers[-1:])
    for number, layer in enumerate(group.layers):
        prefix = "" if number == len(group.layers) - 1 else f"aux_{number}_"
        for name, got in (("pred_logits", layer.logits), ("pred_boxes", layer.boxes)):
            yield from compare("outputs", prefix + name, got, case)
    if "targets" in case.inputs:
        targets = targets_of(case.inputs["targets"])
        losses = criterion_losses(case, group, targets, run.reconstruction)
        yield from compare_matching(case, decoder_outputs(group.layers), targets)
        yield from compare_losses(case, losses)
        if model.training:
            box_losses = _box_losses(case, group, targets)
            totals = {"grad_norms_boxes": box_losses.total, "grad_norms": losses.total}
            yield from compare_gradients(case, model, totals, detr_name)


def intermediates(case: Case, detector: Detector, images: Images, run: Run) -> Iterator[Finding]:
    """From the CNN to the decoder's states, so that a difference shows where it begins."""
    memory = run.output.memory
    (rows, columns), batch = memory.spatial_shapes[0], len(images.sizes)
    yield from _backbone(case, detector, images)
    mask = memory.padding.view(batch, rows, columns)
    yield from compare("intermediates", "feature_mask", mask.float(), case)
    position = memory.position.view(batch, rows, columns, -1).permute(0, 3, 1, 2)
    yield from compare("intermediates", "position", position, case)
    yield from compare("intermediates", "input_proj_first4", run.projected[:, :4], case)
    yield from compare("intermediates", "encoder_memory_first4", memory.tokens[:, :4], case)
    hidden = torch.stack([layer.hidden for layer in run.output.groups[0].layers])
    yield from compare("intermediates", "decoder_hidden_first4", hidden[:, :, :4], case)


def _backbone(case: Case, detector: Detector, images: Images) -> Iterator[Finding]:
    with torch.no_grad():
        body = detector.backbone.body
        assert isinstance(body, ResNet)
        folded = body.fold(torch.float32)
        features = run_stem(folded, images.pixels)
        means, deviations = [], []
        for blocks in folded.stages:
            features = run_stage(blocks, features)
            means.append(features.mean((1, 2, 3)))
            deviations.append(features.std((1, 2, 3), correction=0))
    yield from compare("intermediates", "backbone_mean", torch.stack(means), case)
    yield from compare("intermediates", "backbone_std", torch.stack(deviations), case)
    yield from compare("intermediates", "backbone_c5_corner", features[:, *_CORNER], case)


def _patch_findings(case: Case, run: Run, features: Tensor) -> Iterator[Finding]:
    assert run.patch_queries is not None
    yield from compare("intermediates", "patch_query", run.patch_queries, case)
    yield from compare("intermediates", "query_position", run.queries.position, case)
    if run.reconstruction is None:
        return
    yield from compare("intermediates", "gt_feature", features, case)
    *others, last = run.reconstruction.predicted
    queries = torch.from_numpy(case.arrays["pred_feature_queries"])
    yield from compare("outputs", "pred_feature_at_queries", last[:, queries], case)
    yield from compare("outputs", "pred_feature_norm", last.norm(dim=-1), case)
    for number, layer in enumerate(others):
        yield from compare("outputs", f"aux_{number}_pred_feature_norm", layer.norm(dim=-1), case)


def _box_losses(case: Case, group: GroupOutput, targets: Targets) -> Losses:
    """The criterion with the box terms alone; the matching is that of all costs."""
    boxes_only = LossWeights(
        classes=0.0,
        boxes_l1=float(case.config["bbox_loss_coef"]),
        giou=float(case.config["giou_loss_coef"]),
    )
    return set_losses(group, targets, boxes_only, costs_of(case.config))


def tensors_of(case: Case) -> dict[str, Tensor]:
    """The tensors of the case's manifest, by formula."""
    assert case.manifest is not None
    made = formula.weights(case.manifest, case.config.get("fill_overrides", {}))
    return {name: torch.from_numpy(np.asarray(value)) for name, value in made.items()}


def _settings(case: Case, tensors: dict[str, Tensor]) -> DetectorSettings:
    config = case.config
    settings = detr_settings(
        tensors,
        source="formula",
        num_heads=config["nheads"],
        dilation=config["dilation"],
        train_backbone=config["train_backbone"],
    )
    return confirmed(case, settings)


def confirmed(case: Case, settings: DetectorSettings) -> DetectorSettings:
    """Settings inferred from tensors, which the case's own words must confirm, for a comparison."""
    config = case.config
    if config["activation"] != "relu" or config["dropout"]:
        raise NotSupportedError(f"activation {config['activation']}, dropout {config['dropout']}")
    told = {
        "backbone": settings.backbone.name,
        "position_embedding": settings.position,
        "enc_layers": settings.encoder_layers,
        "dec_layers": settings.decoder_layers,
        "dim_feedforward": settings.feedforward_dim,
        "hidden_dim": settings.hidden_dim,
        "nheads": settings.num_heads,
        "pre_norm": settings.pre_norm,
        "num_queries": settings.num_queries,
        "num_classes": settings.num_classes,
    }
    confirm(case, told)
    backbone = settings.backbone.model_copy(update={"frozen_precision": "float32"})
    return settings.model_copy(update={"dropout": 0.0, "backbone": backbone})


def confirm(case: Case, told: Mapping[str, object]) -> None:
    """ValueError where the config of a case has another value for one of the keys."""
    wrong = {
        key: value
        for key, value in told.items()
        if key in case.config and case.config[key] != value
    }
    if wrong:
        raise ValueError(f"inferred {wrong} from the tensors, against the case's config")


def images_of(case: Case) -> Images:
    """The pictures of the case, padded to the largest."""
    made = [_picture(described) for described in case.inputs["images"]]
    sizes = torch.tensor([picture.shape[1:] for picture in made])
    height, width = sizes.amax(0).tolist()
    pixels = torch.zeros(len(made), 3, height, width)
    for place, picture in zip(pixels, made, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    return Images(pixels, padding_of(sizes, height, width), sizes)


def _picture(described: dict[str, object]) -> Tensor:
    name, height, width = described["name"], described["height"], described["width"]
    return torch.from_numpy(formula.picture(str(name), int(str(height)), int(str(width))))


def _patches(case: Case) -> Tensor:
    described = case.inputs["patches"]
    side = {"height": described["height"], "width": described["width"]}
    return torch.stack(
        [
            torch.stack([_picture({"name": name, **side}) for name in names])
            for names in described["names"]
        ]
    )


def _draws(case: Case) -> PatchDraws | None:
    """The reference's own draws; none in evaluation and where nothing is drawn."""
    if case.config["mode"] != "train":
        return None
    num_queries, batch = case.config["num_queries"], len(case.inputs["images"])
    keep = torch.ones(batch, num_queries, dtype=torch.bool)
    if "keep" in case.inputs:
        described = case.inputs["keep"]
        drawn = formula.keep(described["name"], tuple(described["shape"]), described["ratio"])
        assert np.array_equal(drawn, case.arrays["keep"] != 0), "the formula of keep has changed"
        keep = torch.from_numpy(drawn[..., 0].T.copy())
    elif case.config["mask_ratio"]:
        raise NotSupportedError("a mask_ratio without the draws in inputs.keep")
    order = torch.arange(num_queries)
    if case.config["query_shuffle"]:
        if "order" not in case.arrays:
            raise NotSupportedError("query_shuffle without the permutation in the array order")
        order = torch.from_numpy(case.arrays["order"])
    return PatchDraws(keep, order)


class Watch:
    """Takes down what enters the decoder and leaves the input projection."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._queries: QueryGroup | None = None
        self._projected: Tensor | None = None

    def __enter__(self) -> "Watch":
        def take_queries(_: nn.Module, given: tuple[object, ...]) -> None:
            groups = given[1]
            assert isinstance(groups, tuple)
            self._queries = groups[0]

        def take_projected(_: nn.Module, given: object, said: Tensor) -> None:
            self._projected = said

        assert self._detector.input_projection is not None
        self._handles = [
            self._detector.decoder.register_forward_pre_hook(take_queries),
            self._detector.input_projection.register_forward_hook(take_projected),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def queries(self) -> QueryGroup:
        assert self._queries is not None
        return self._queries

    @property
    def projected(self) -> Tensor:
        assert self._projected is not None
        return self._projected
