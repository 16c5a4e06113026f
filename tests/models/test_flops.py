"""Multiply-adds of a picture, against published numbers and against real tensors."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.flops import NORMALISATIONS, MultiplyAdds, count_flops
from tests.models.conditional_small import ANCHORS, CONDITIONAL
from tests.models.deformable_small import OBJECTNESS, SPARSE, TWO_STAGE, drawn
from tests.models.test_detector import images

TOKENS = 107 * 130 + 54 * 65 + 27 * 33 + 14 * 17
"""Of a picture of 850x1040 pixels."""
PLAIN: dict[str, Any] = {
    "encoder_attention": "deformable",
    "decoder_attention": "deformable",
    "feature_levels": 4,
    "class_scores": "sigmoid",
    "feedforward_dim": 1024,
    "num_queries": 300,
}
EFFICIENT = PLAIN | {
    "box_refinement": True,
    "two_stage": True,
    "proposal_content": "memory",
    "proposal_classes": "all",
}


def published(backbone: str, kind: dict[str, Any]) -> MultiplyAdds:
    """Of the paper's detector for COCO's 91 class numbers and the paper's picture."""
    chosen = kind | {"backbone": {"name": backbone, "weights": "random"}, "num_classes": 91}
    read = DetectorSettings.model_validate(chosen)
    return count_flops(Detector(read, torch.Generator().manual_seed(0)), 850, 1040)


BOX_HEADS = 6 * 300 * (256 * 256 * 2 + 256 * 4)
"""Which the public code evaluates twice where boxes are refined."""


@pytest.mark.parametrize(
    ("backbone", "kind", "again", "wanted"),
    [
        ("resnet50", PLAIN, 0, 172.93),
        ("swin_t", EFFICIENT, BOX_HEADS, 184.80),
    ],
)
def test_deformable_detr_costs_what_is_published(
    backbone: str, kind: dict[str, Any], again: int, wanted: float
) -> None:
    """Acceptance check 9.10; GitHub tables of Deformable DETR (173 G) and Sparse DETR."""
    found = published(backbone, kind)
    assert (found.total + again) / 1e9 == pytest.approx(wanted, abs=0.01)


def test_sparse_detr_costs_what_its_public_code_does_without_what_only_training_needs() -> None:
    """Reference, 3.13: 129.81 G measured with its five auxiliary heads, at rho = 0.3.

    Its table says 120.5. It is lower than what the public code measures by 4 % at every rho (3 % of
    Swin-T), in the part that grows with rho and in the other: no head left out of the count does
    that, fewer tokens would.
    """
    found = published("resnet50", EFFICIENT | {"rho": 0.3})
    selected = int(0.3 * TOKENS) + 1
    auxiliary = 5 * selected * (256 * 91 + 256 * 256 * 2 + 256 * 4)
    assert (found.total + BOX_HEADS) / 1e9 == pytest.approx(125.49, abs=0.01)
    assert (found.total + BOX_HEADS + auxiliary) / 1e9 == pytest.approx(129.81, abs=0.01)
    assert found.encoder_values == 6 * TOKENS * 256 * 256
    assert found.encoder_feedforward == 6 * selected * 2 * 256 * 1024
    assert found.encoder_sampling == 6 * selected * 16 * 256 * 4
    norms = 12 * 5 * selected * 256
    assert found.encoder_queries == 6 * selected * (256 * 256 * 2 + 256 * 128) + norms


def test_detr_costs_what_is_published() -> None:
    """86 G, a mean over 100 pictures of several sizes: 1.3 % more than that of 850x1040."""
    found = published("resnet50", {})
    assert found.total / 1e9 == pytest.approx(86, rel=0.015)
    assert found.encoder_values == found.encoder_sampling == found.proposals == found.scoring == 0


@pytest.mark.parametrize(
    ("kind", "parameters", "encoder", "decoder"),
    [(CONDITIONAL, 43_418_401, 11.66, 6.44), (ANCHORS, 43_671_517, 12.49, 7.13)],
    ids=["conditional", "anchors"],
)
def test_conditional_and_dab_detr_have_the_parameters_and_costs_of_the_public_code(
    kind: dict[str, Any], parameters: int, encoder: float, decoder: float
) -> None:
    """At 800x1333, from the modules of the public code; the decoder with its heads.

    Published are 44 M for both, 90 G and 94 G with smaller pictures.
    """
    made = kind | {
        "backbone": {"name": "resnet50", "weights": "random"},
        "num_classes": 91,
        "num_queries": 300,
    }
    model = Detector(DetectorSettings.model_validate(made), torch.Generator().manual_seed(0))
    assert sum(part.numel() for part in model.parameters()) == parameters
    found = count_flops(model, 800, 1333)
    assert found.encoder / 1e9 == pytest.approx(encoder, abs=0.01)
    assert (found.decoder + found.heads) / 1e9 == pytest.approx(decoder, abs=0.01)
    assert found.backbone / 1e9 == pytest.approx(87.3, abs=0.1)


@pytest.mark.parametrize("kind", [{}, TWO_STAGE, SPARSE, OBJECTNESS])
def test_counts_without_values_are_those_of_real_tensors(kind: dict[str, object]) -> None:
    """Beside them the sampling, which no counter sees: four corners of 4 levels * 4 points."""
    model, batch = drawn(kind).requires_grad_(False), images((70, 100))
    found = count_flops(model, 70, 100)
    counter = FlopCounterMode(display=False, custom_mapping=NORMALISATIONS)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        memory = model(batch).memory
    updated, per_query = 0, 0
    if kind:
        selected = memory.selection
        updated = memory.tokens.shape[1] if selected is None else selected.indices.shape[1]
        per_query = 4 * 4 * 16 * 4
    assert found.encoder_sampling == per_query * 2 * updated
    sampling = per_query * 2 * (updated + 5)
    assert found.total == counter.get_total_flops() // 2 + sampling
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.backbone.levels(batch.pixels, model.settings.backbone_levels)
    assert found.backbone == counter.get_total_flops() // 2


def test_counting_leaves_the_detector_as_it_was() -> None:
    model = drawn(SPARSE, noise=0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, 64, 96)
    assert model.training
    assert all(not part._forward_hooks for part in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(isinstance(part, nn.Parameter) for part in model.parameters())
    assert model.eval()(images((64, 96))).memory.tokens.isfinite().all()
