"""Small detectors of every kind, to teach and to learn from each other; a batch of two pictures."""

import torch

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.structures import DetectionBatch, Images, Targets, padding_of

PLAIN = {
    "backbone": {"name": "resnet18", "weights": "random", "frozen_precision": "float32"},
    "hidden_dim": 32,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 48,
    "dropout": 0.0,
    "num_queries": 7,
    "num_classes": 3,
}
KINDS = {
    "detr": PLAIN,
    "conditional": PLAIN | {"decoder_attention": "conditional", "class_scores": "sigmoid"},
    "dab": PLAIN
    | {"decoder_attention": "conditional", "class_scores": "sigmoid", "query_kind": "anchor"},
    "deformable": PLAIN
    | {
        "encoder_attention": "deformable",
        "decoder_attention": "deformable",
        "class_scores": "sigmoid",
        "feature_levels": 2,
    },
    "sparse": PLAIN
    | {
        "encoder_attention": "deformable",
        "decoder_attention": "deformable",
        "class_scores": "sigmoid",
        "feature_levels": 2,
        "box_refinement": True,
        "two_stage": True,
        "proposal_content": "memory",
        "proposal_classes": "all",
        "rho": 0.5,
    },
}


def settings_of(kind: str, **changes: object) -> DetectorSettings:
    """The settings of a small detector of this kind."""
    return DetectorSettings.model_validate(KINDS[kind] | changes)


def detector_of(kind: str, seed: int = 0, **changes: object) -> Detector:
    """Heads that say something from the start, so that queries differ."""
    generator = torch.Generator().manual_seed(seed)
    detector = Detector(settings_of(kind, **changes), generator)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if "box_head" in name or "class_head" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return detector


def batch_of_two(*, blank: bool = False) -> DetectionBatch:
    """Pictures of 64 x 96 and 96 x 48 pixels, with three objects and one."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[64, 96], [96, 48]])
    pixels = torch.randn(2, 3, 96, 96, generator=generator)
    boxes = tuple(0.2 + 0.3 * torch.rand(count, 4, generator=generator) for count in (3, 1))
    labels = (torch.tensor([0, 2, 1]), torch.tensor([2]))
    return DetectionBatch(
        images=Images(pixels, padding_of(sizes, 96, 96), sizes),
        targets=Targets(boxes, labels),
        keys=("a", "b"),
        sample_ids=torch.tensor([0, 1]),
        blank=blank,
    )
