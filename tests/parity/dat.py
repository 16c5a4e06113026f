"""Parity of DAT and DAT++ classifiers: maps of all stages, deformed points, logits, gradients."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import BackboneSettings
from models.classifier import Classifier
from models.dat import Dat, DatLayout, DatName, DatStage, dat_layout
from models.dat_attention import DatAttention
from models.interop.backbones import file_names
from models.interop.classifiers import classifier_name, place_classifier
from tests.parity import formula
from tests.parity.case import (
    LOSS_FLOOR,
    LOSS_TOLERANCE,
    Case,
    Finding,
    NotSupportedError,
    compare,
    compare_values,
)
from tests.parity.detector import tensors_of
from tests.parity.gradients import compare_gradients, trained_finding

_NAMES: tuple[DatName, ...] = ("dat_t", "dat_s", "dat_b", "dat_pp_t", "dat_pp_s", "dat_pp_b")
_CORNER = (slice(None), slice(0, 6), slice(0, 4), slice(0, 4))


def run_dat_case(case: Case) -> Iterator[Finding]:
    """A classifier in evaluation mode, all of it trained."""
    settings, tensors = _settings(case), tensors_of(case)
    model = Classifier(settings, case.config["num_classes"], torch.Generator())
    place_classifier(model, tensors, case.name, head="file")
    name_of = classifier_name(model, file_names(model.backbone, tensors, case.name))
    watched = _Watch(model)
    logits = model.eval()(_pictures(case))
    loss = F.cross_entropy(logits, torch.tensor(case.inputs["labels"]))
    yield trained_finding(case, model, name_of)
    yield from watched.findings(case)
    yield from compare("outputs", "logits", logits, case)
    got = loss.detach().reshape(1).numpy()
    expected = case.arrays["loss_total"]
    yield compare_values("losses", "loss_total", got, expected, LOSS_TOLERANCE, LOSS_FLOOR)
    yield from compare_gradients(case, model, {"grad_norms": loss}, name_of)


class _Watch:
    """What passes between the parts of a DAT."""

    def __init__(self, model: Classifier) -> None:
        body = model.backbone.body
        assert isinstance(body, Dat)
        self.maps: dict[str, Tensor] = {}
        self.attended: dict[str, Tensor] = {}
        self.points: dict[str, tuple[Tensor, Tensor]] = {}
        self._keep(body.patch_embedding, "patch")
        for number, stage in enumerate(body.stages):
            assert isinstance(stage, DatStage)
            self._keep(stage.blocks[-1], f"stage{number}")
            deformable = [part for part in stage.modules() if isinstance(part, DatAttention)]
            for last in deformable[-1:]:
                last.register_forward_hook(partial(self._keep_points, f"stage{number}"))

    def findings(self, case: Case) -> Iterator[Finding]:
        """Of what was seen, in the order in which it is computed."""
        for name, found in self.maps.items():
            yield from compare("maps", f"{name}_channel_mean", found.mean((2, 3)), case)
            yield from compare("maps", f"{name}_mean", found.mean((1, 2, 3)), case)
            yield from compare("maps", f"{name}_std", found.flatten(1).std(1), case)
            yield from compare("maps", f"{name}_corner", found[_CORNER], case)
        for name, (moved, reference) in self.points.items():
            unmoved = reference.expand_as(moved)
            yield from compare("points", f"{name}_last_deformable_points", moved, case)
            yield from compare("points", f"{name}_last_reference_points", unmoved, case)
            mean = self.attended[name].mean((1, 2))
            whole = f"{name}_last_deformable_output_channel_mean"
            yield from compare("points", whole, mean, case)

    def _keep(self, part: nn.Module, name: str) -> None:
        def hook(_part: nn.Module, _given: object, said: Tensor) -> None:
            self.maps[name] = said.detach().permute(0, 3, 1, 2)

        part.register_forward_hook(hook)

    def _keep_points(
        self, name: str, part: DatAttention, given: tuple[Tensor], said: Tensor
    ) -> None:
        points = part.points(given[0].detach())
        self.points[name] = (points.moved.detach(), points.reference)
        self.attended[name] = said.detach()


def _settings(case: Case) -> BackboneSettings:
    wanted = case.config
    names = [name for name in _NAMES if _fits(dat_layout(name), wanted)]
    if not names or any(wanted["dwc_pes"]) or any(wanted["no_offs"]) or any(wanted["fixed_pes"]):
        raise NotSupportedError(f"the DAT of {case.name}")
    return BackboneSettings(
        name=names[0], weights="random", train=True, drop_path=0.0, trained_size=wanted["img_size"]
    )


def _fits(layout: DatLayout, wanted: Mapping[str, Any]) -> bool:
    is_plus_plus = "L" not in str(wanted["stage_spec"])
    return (list(layout.channels), list(layout.depths), layout.is_plus_plus) == (
        wanted["dims"],
        wanted["depths"],
        is_plus_plus,
    )


def _pictures(case: Case) -> Tensor:
    pictures = [
        formula.picture(image["name"], image["height"], image["width"])
        for image in case.inputs["images"]
    ]
    return torch.from_numpy(np.stack(pictures))
