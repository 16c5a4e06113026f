"""Boxes, then masks, of two made pictures are learned by heart: the chain has no break."""

from pathlib import Path

import pytest
import torch
from torch import nn

from data.detection_set import DetectionSet
from finetune.objective import DetectionObjective
from finetune.panoptic_evaluation import evaluate_panoptic
from finetune.panoptic_postprocess import SegmentSettings
from finetune.panoptic_quality import PanopticQuality
from finetune.panoptic_task import PanopticObjective
from models.detector import Detector
from models.losses import LossWeights
from models.mask_head import MaskHeadSettings, PanopticDetector
from models.mask_losses import MaskLossWeights
from models.matching import MatchingCosts
from models.structures import DetectionBatch
from tests.data.panoptic_batches import first_batch
from tests.data.panoptic_sets import panoptic_set
from tests.finetune.test_panoptic_task import ALONE, judging, small_settings
from tests.training.small import losses_alone

Objective = DetectionObjective | PanopticObjective


@pytest.mark.slow
def test_two_pictures_are_learned_by_heart(tmp_path: Path) -> None:
    data = panoptic_set(tmp_path, 2)
    batch = first_batch(data, "none")
    generator = torch.Generator().manual_seed(0)
    detector = Detector(small_settings(data.classes), generator)
    costs, queries = MatchingCosts(), detector.settings.num_queries
    learn(detector, DetectionObjective(costs, LossWeights(), queries), batch, (5e-4, 0.1), 160)
    model = PanopticDetector(detector, MaskHeadSettings(), generator)
    learn(model, PanopticObjective(costs, MaskLossWeights(), queries), batch, (5e-4, 10.0), 160)
    found = quality(model, data)
    assert found.all is not None
    assert found.all.pq > 0.7


def learn(
    model: nn.Module,
    objective: Objective,
    batch: DetectionBatch,
    rate_and_clip: tuple[float, float],
    steps: int,
) -> None:
    lr, clip_norm = rate_and_clip
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        losses = losses_alone(objective, model, batch)
        optimiser.zero_grad()
        torch.autograd.backward(losses.total)
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimiser.step()


def quality(model: PanopticDetector, data: DetectionSet) -> PanopticQuality:
    """At the size of the training pictures."""
    segments = SegmentSettings(threshold=0.5)
    score = evaluate_panoptic(model.eval(), data, data.classes, judging(80), segments, ALONE)
    return score().quality
