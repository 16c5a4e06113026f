"""A batch of labelled pictures in several passes teaches what one pass over it teaches."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from finetune.objective import DetectionObjective
from finetune.one_shot_task import OneShotObjective
from finetune.panoptic_task import PanopticObjective
from models.detection_losses import supervision_of
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.losses import LossWeights
from models.mask_head import MaskHeadSettings, PanopticDetector
from models.mask_losses import MaskLossWeights
from models.matching import MatchingCosts
from models.one_shot import one_shot_detector
from models.structures import DetectionBatch, Images, Targets, padding_of
from tests.data.panoptic_batches import first_batch
from tests.data.panoptic_sets import panoptic_set
from tests.finetune.small_detector import SETTINGS
from tests.finetune.test_objective import SPARSE
from tests.finetune.test_panoptic_task import small_settings
from tests.training.gradients import relative_difference, step_gradient
from training.job import Objective

COUNTS = (3, 0, 9, 1, 2)
"""Boxes by picture; one has more than there are queries."""
DENSE = SETTINGS.model_copy(update={"dropout": 0.0})


def noise(label: int = 2, patches: bool = False) -> DetectionBatch:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[64, 96], [96, 48], [80, 80], [33, 96], [96, 96]])
    padding = padding_of(sizes, 96, 96)
    pixels = torch.randn(5, 3, 96, 96, generator=generator) * ~padding[:, None]
    crops = torch.randn(5, 1, 3, 32, 32, generator=generator)
    return DetectionBatch(
        images=Images(pixels, padding, sizes),
        targets=Targets(
            tuple(0.2 + 0.3 * torch.rand(count, 4, generator=generator) for count in COUNTS),
            tuple(torch.full((count,), label) for count in COUNTS),
        ),
        keys=tuple("abcde"),
        sample_ids=torch.arange(5),
        query_patches=crops if patches else None,
    )


def difference(
    model: nn.Module, objective: Objective[DetectionBatch], batch: DetectionBatch
) -> float:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = step_gradient(model.train(), objective, batch, None)
    model.load_state_dict(before)
    return relative_difference(step_gradient(model, objective, batch, 2), whole)


@pytest.mark.parametrize("kind", ["dense", "sparse", "one shot"])
@pytest.mark.parametrize("no_object", [0.1, "paper"])
def test_passes_learn_what_one_pass_learns(kind: str, no_object: float | Literal["paper"]) -> None:
    weights, generator = LossWeights(no_object=no_object), torch.Generator().manual_seed(0)
    if kind == "one shot":
        asked = one_shot_detector(DENSE.model_copy(update={"num_classes": None}), generator)
        objective = OneShotObjective(MatchingCosts(), weights, DENSE.num_queries)
        assert difference(asked, objective, noise(label=1, patches=True)) < 1e-6
        return
    settings = DENSE
    if kind == "sparse":
        settings = DetectorSettings.model_validate(SPARSE | {"dropout": 0.0})
    detector = DetectionObjective(
        MatchingCosts(), weights, settings.num_queries, supervision_of(settings)
    )
    assert difference(Detector(settings, generator), detector, noise()) < 1e-6


def test_a_mask_head_learns_in_passes_what_it_learns_in_one(tmp_path: Path) -> None:
    data = panoptic_set(tmp_path, 3)
    settings = small_settings(data.classes).model_copy(update={"dropout": 0.0})
    generator = torch.Generator().manual_seed(0)
    model = PanopticDetector(Detector(settings, generator), MaskHeadSettings(), generator)
    objective = PanopticObjective(MatchingCosts(), MaskLossWeights(), settings.num_queries)
    assert difference(model, objective, first_batch(data, "none")) < 3e-6
