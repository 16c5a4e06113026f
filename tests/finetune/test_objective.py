"""The detection objective on detectors whose tokens learn too."""

import pytest
import torch

from finetune.objective import DetectionObjective
from models.detection_losses import Supervision, supervision_of
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.selection import SelectionSettings
from models.structures import DetectionBatch, Images, Losses, Targets, padding_of
from tests.finetune.small_detector import SETTINGS
from tests.training.small import losses_alone

SPARSE = SETTINGS.model_dump() | {
    "encoder_layers": 2,
    "class_scores": "sigmoid",
    "encoder_attention": "deformable",
    "decoder_attention": "deformable",
    "feature_levels": 2,
    "box_refinement": True,
    "two_stage": True,
    "proposal_content": "memory",
    "proposal_classes": "all",
    "rho": 0.4,
}


def sparse_detector(criterion: str) -> Detector:
    given = SPARSE | {"selection": {"criterion": criterion}}
    settings = DetectorSettings.model_validate(given)
    return Detector(settings, torch.Generator().manual_seed(0)).train()


def batch(*counts: int, blank: bool = False) -> DetectionBatch:
    """Two pictures, 64 x 96 and 96 x 48, with so many objects."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[64, 96], [96, 48]])
    pixels = torch.randn(2, 3, 96, 96, generator=generator)
    boxes = tuple(0.2 + 0.3 * torch.rand(count, 4, generator=generator) for count in counts)
    labels = tuple(torch.full((count,), 2) for count in counts)
    return DetectionBatch(
        images=Images(pixels, padding_of(sizes, 96, 96), sizes),
        targets=Targets(boxes, labels),
        keys=("a", "b"),
        sample_ids=torch.tensor([0, 1]),
        blank=blank,
    )


def losses_of(model: Detector, given: DetectionBatch) -> Losses:
    supervision = supervision_of(model.settings)
    queries = model.settings.num_queries
    objective = DetectionObjective(MatchingCosts(), LossWeights(), queries, supervision)
    return losses_alone(objective, model, given)


@pytest.mark.parametrize(
    ("criterion", "term"),
    [
        ("dam", "loss_mask_prediction"),
        ("objectness", "loss_ce_backbone"),
        ("random", "loss_ce_enc_0"),
    ],
)
@pytest.mark.parametrize("given", [batch(3, 0), batch(0, 0), batch(0, 0, blank=True)])
def test_every_parameter_of_a_sparse_detector_gets_a_finite_gradient(
    criterion: str, term: str, given: DetectionBatch
) -> None:
    model = sparse_detector(criterion)
    losses = losses_of(model, given)
    assert term in losses.terms
    losses.total.backward()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    without = [name for name, tensor in trained.items() if tensor.grad is None]
    assert without == []
    broken = [name for name, p in trained.items() if p.grad is not None and p.grad.isnan().any()]
    assert broken == []


def test_a_broken_head_gives_nan_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse_detector("dam")
    assert model.proposal_box_head is not None
    with torch.no_grad():
        model.proposal_box_head.layers[-1].bias.fill_(torch.nan)
    losses = losses_of(model, batch(2, 1))
    losses.total.backward()
    assert losses.total.isnan()
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert all(tensor.grad is not None for tensor in trained)
    assert "the step is left out: no finite matching cost" in caplog.text


def test_supervision_is_what_the_settings_say() -> None:
    assert supervision_of(SETTINGS) == Supervision()
    legacy = SelectionSettings(legacy_dam=True, legacy_padding=True)
    told = DetectorSettings.model_validate(SPARSE | {"selection": legacy.model_dump()})
    assert supervision_of(told) == Supervision(
        "sigmoid", "all", legacy_dam=True, legacy_padding=True
    )
