"""What a student learns with and without D3ETR, in minutes on one core; and what a step costs.

    python -m benchmarks.distillation learn --output DIR [--seeds 3] [--steps 500]
    python -m benchmarks.distillation cost [--side 320]

`learn`: drawn scenes of 64 x 64 pixels with one to three boxes of four classes; cells of 8 x 8
pixels are the features, there is no CNN. A Conditional DETR decoder of three layers, width 64 and
24 queries reads them. The teacher sees all of a cell and trains for 2500 steps; the students see
twelve random projections of it (a weaker backbone) and train for 500, each variant from the same
first weights and with the same batches. AP50 on 160 other scenes, every 50 steps. Writes
DIR/distillation.json and DIR/distillation.png.

`cost`: steps of Conditional DETR, ResNet-18 from ResNet-50, with and without a teacher, in turn;
the share that the multiply-adds would make; and the copies from device to host of the matching.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

from finetune.distill import DistillSettings
from finetune.distillation import DistillationObjective
from finetune.objective import DetectionObjective
from finetune.teacher import Teacher
from models.boxes import cxcywh_to_xyxy, iou
from models.detection_losses import supervision_of
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.distillation_losses import layer_pairs
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.shares import Share
from models.structures import DetectionBatch, Images, Memory, Targets, padding_of
from pretrain.detection_ap import PictureDetections, average_precision
from training.job import Objective

mpl.use("Agg")

CANVAS, CELL = 64, 8
CLASSES = 4
BATCH, HELD_OUT = 8, 160
LOOK_EVERY = 50
TEACHER_STEPS = 2500
SEEN_BY_STUDENT = 12
PLAIN: dict[str, object] = {
    "backbone": {"name": "resnet18", "weights": "random", "frozen_precision": "float32"},
    "hidden_dim": 64,
    "num_heads": 4,
    "encoder_layers": 0,
    "decoder_layers": 3,
    "feedforward_dim": 128,
    "dropout": 0.0,
    "num_queries": 24,
    "num_classes": CLASSES,
    "decoder_attention": "conditional",
    "class_scores": "sigmoid",
}
NOTHING = {"weight": 0.0}
PREDICTIONS = {"self_attention": NOTHING, "cross_attention": NOTHING}
VARIANTS: dict[str, Mapping[str, object] | None] = {
    "no teacher": None,
    "adaptive": {"fixed": False, **PREDICTIONS},
    "fixed": {"adaptive": False, **PREDICTIONS},
    "both": PREDICTIONS,
    "both, attention (mse)": {
        "self_attention": {"weight": 5.0},
        "cross_attention": {"weight": 5.0},
    },
    "both, attention (kl)": {
        "self_attention": {"distance": "kl"},
        "cross_attention": {"distance": "kl"},
    },
}


class SceneDetector(Detector):
    """A detector whose features are the cells of a scene, or some projections of them."""

    def __init__(self, generator: torch.Generator, seen: int | None) -> None:
        super().__init__(DetectorSettings.model_validate(PLAIN), generator)
        channels = 3 * CELL * CELL
        projection = torch.eye(channels)
        if seen is not None:
            drawn = torch.randn(channels, seen, generator=torch.Generator().manual_seed(99))
            projection = drawn / channels**0.5
        self.projection = projection

    def encode(self, images: Images) -> Memory:
        """Cells as tokens, filled up with zeros to the channels of the CNN that is not used."""
        cells = images.pixels.unfold(2, CELL, CELL).unfold(3, CELL, CELL)
        seen = cells.permute(0, 2, 3, 1, 4, 5).flatten(3) @ self.projection
        empty = seen.new_zeros((*seen.shape[:3], self.backbone.channels - seen.shape[3]))
        maps = torch.cat((seen, empty), dim=3).permute(0, 3, 1, 2)
        return self.encode_features((maps,), images.padding)


def scenes(count: int, seed: int) -> DetectionBatch:
    """Scenes with one to three boxes, each class of a colour of its own, on noise."""
    generator = np.random.default_rng(seed)
    colours = np.array([[1, -1, 0], [-1, 1, 0], [0, -1, 1], [1, 0, -1]], dtype=np.float32)
    pixels = 0.5 * generator.standard_normal((count, 3, CANVAS, CANVAS)).astype(np.float32)
    boxes, labels = list[Tensor](), list[Tensor]()
    for picture in pixels:
        found, classes = [], []
        for _ in range(generator.integers(1, 4)):
            width, height = generator.integers(12, 40, size=2)
            left, top = (generator.integers(0, CANVAS - side) for side in (width, height))
            label = generator.integers(CLASSES)
            picture[:, top : top + height, left : left + width] = colours[label][:, None, None]
            found.append([left + width / 2, top + height / 2, width, height])
            classes.append(label)
        picture += 0.3 * generator.standard_normal(picture.shape).astype(np.float32)
        boxes.append(torch.tensor(np.array(found) / CANVAS, dtype=torch.float32))
        labels.append(torch.tensor(np.array(classes)))
    sizes = torch.tensor([[CANVAS, CANVAS]] * count)
    return DetectionBatch(
        images=Images(torch.from_numpy(pixels), padding_of(sizes, CANVAS, CANVAS), sizes),
        targets=Targets(tuple(boxes), tuple(labels)),
        keys=tuple(str(number) for number in range(count)),
        sample_ids=torch.arange(count),
    )


@torch.no_grad()
def ap50(detector: Detector, judged: DetectionBatch) -> float:
    """Mean over the classes, of the last layer."""
    detector.eval()
    (group,) = detector(judged.images).groups
    detector.train()
    last = group.layers[-1]
    scores, boxes = last.logits.sigmoid(), cxcywh_to_xyxy(last.boxes)
    found = []
    for label in range(CLASSES):
        pictures = []
        for picture, labels in enumerate(judged.targets.labels):
            wanted = judged.targets.boxes_cxcywh[picture][labels == label]
            overlaps = iou(boxes[picture], cxcywh_to_xyxy(wanted))
            said = scores[picture, :, label].numpy()
            pictures.append(PictureDetections(said, overlaps.numpy()))
        found.append(average_precision(pictures).ap50)
    return float(np.nanmean(found))


@dataclass
class Curve:
    """Of one run."""

    steps: list[int] = field(default_factory=list)
    ap50: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    """Share of partners that changed since the look before; empty without adaptive matching."""
    ratio: list[float] = field(default_factory=list)
    """The teacher's loss over the detection loss."""


def ordinary(detector: Detector) -> DetectionObjective:
    """The loss of Conditional DETR."""
    return DetectionObjective(
        MatchingCosts(classes=2), LossWeights(classes=2), 24, supervision_of(detector.settings)
    )


def trained(
    detector: Detector,
    objective: Objective[DetectionBatch],
    steps: int,
    seed: int,
    judged: DetectionBatch,
    lr: float = 1e-3,
) -> Curve:
    """Trains in place."""
    learned = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=lr, weight_decay=1e-4)
    curve = Curve()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 if step < 0.8 * steps else 0.1)
        batch = scenes(BATCH, 1_000_000 * (seed + 1) + step)
        share = Share(objective.counts(batch))
        losses = objective(detector, batch, share, torch.Generator())
        optimiser.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        if (step + 1) % LOOK_EVERY == 0:
            curve.steps.append(step + 1)
            curve.ap50.append(ap50(detector, judged))
            if "kd/match_change_rate" in losses.terms:
                curve.changed.append(float(losses.terms["kd/match_change_rate"]))
            if "kd/ratio_to_det" in losses.terms:
                curve.ratio.append(float(losses.terms["kd/ratio_to_det"]))
    return curve


def teacher_for(detector: Detector, student: Detector, told: Mapping[str, object]) -> Teacher:
    """Without a file: both have the same classes."""
    settings = DistillSettings.model_validate({"teacher": "made", "probe_every": 50, **told})
    depth = student.settings.decoder_layers, detector.settings.decoder_layers
    layers = layer_pairs(*depth, settings.layer_map)
    scores, labels = student.settings.class_scores, torch.arange(CLASSES)
    return Teacher(detector.eval().requires_grad_(False), settings, labels, scores, layers)


def learn(output: Path, seeds: int, steps: int) -> None:
    """Prints a table, and writes the numbers and the picture."""
    torch.set_num_threads(1)
    judged = scenes(HELD_OUT, 7)
    teacher = SceneDetector(torch.Generator().manual_seed(0), None).train()
    begun = time.monotonic()
    taught = trained(teacher, ordinary(teacher), TEACHER_STEPS, 1000, judged)
    print(
        f"teacher: AP50 {taught.ap50[-1]:.3f} after {TEACHER_STEPS} steps, "
        f"{time.monotonic() - begun:.0f} s",
        flush=True,
    )
    curves: dict[str, list[Curve]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        for name, told in VARIANTS.items():
            begun = time.monotonic()
            generator = torch.Generator().manual_seed(100 + seed)
            student = SceneDetector(generator, SEEN_BY_STUDENT).train()
            objective: Objective[DetectionBatch] = ordinary(student)
            if told is not None:
                shown = teacher_for(teacher, student, told)
                objective = DistillationObjective(ordinary(student), shown, student)
            curve = trained(student, objective, steps, seed, judged)
            curves[name].append(curve)
            print(
                f"seed {seed}  {name:24} AP50 {curve.ap50[-1]:.3f}"
                f"{_course('partners changed', curve.changed[1:], 2)}"
                f"{_course('ratio to detection', curve.ratio, 1)}, "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    output.mkdir(parents=True, exist_ok=True)
    content = {name: [vars(curve) for curve in found] for name, found in curves.items()}
    (output / "distillation.json").write_text(json.dumps({"teacher": vars(taught), **content}))
    for name, found in curves.items():
        ends = [curve.ap50[-1] for curve in found]
        print(
            f"{name:24} mean {statistics.mean(ends):.3f}   " + "  ".join(f"{e:.3f}" for e in ends)
        )
    draw(output / "distillation.png", curves, taught.ap50[-1])


def _course(what: str, values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    return f", {what} {values[0]:.{digits}f} -> {values[-1]:.{digits}f}"


def draw(place: Path, curves: Mapping[str, Sequence[Curve]], teacher: float) -> None:
    """Learning curves: the mean over the seeds, and the range as a band."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, found in curves.items():
        by_seed = np.array([curve.ap50 for curve in found])
        (line,) = axes.plot(found[0].steps, by_seed.mean(0), label=name)
        axes.fill_between(
            found[0].steps, by_seed.min(0), by_seed.max(0), color=line.get_color(), alpha=0.15
        )
    axes.axhline(teacher, color="black", linestyle=":", label="the teacher")
    axes.set(xlabel="step", ylabel="AP50 on 160 drawn scenes", ylim=(0, 1))
    axes.set_title(f"A student with and without D3ETR, {len(found)} seeds (mean and range)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(place, dpi=130)


def cost(side: int, repeats: int) -> None:
    """Prints the times of steps in turn, and the copies to the host."""
    torch.set_num_threads(2)
    settings = {
        "decoder_attention": "conditional", "class_scores": "sigmoid", "num_queries": 300,
        "num_classes": CLASSES,
    }  # fmt: skip
    backbones = {
        name: {
            "name": name,
            "weights": "random",
            "train": name == "resnet18",
            "frozen_precision": "float32",
        }
        for name in ("resnet18", "resnet50")
    }
    made = {
        name: Detector(
            DetectorSettings.model_validate({**settings, "backbone": backbone}),
            torch.Generator().manual_seed(0),
        )
        for name, backbone in backbones.items()
    }
    student = made["resnet18"].train()
    batch = _pictures(side)
    plain = ordinary(student)
    taught = DistillationObjective(plain, teacher_for(made["resnet50"], student, {}), student)
    objectives: dict[str, Objective[DetectionBatch]] = {"plain": plain, "with D3ETR": taught}
    times: dict[str, list[float]] = {name: [] for name in objectives}
    for turn in range(repeats + 1):
        for name, objective in objectives.items():
            spent = _timed(lambda objective=objective: _step(student, objective, batch))
            if turn:
                times[name].append(spent)
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(
        f"{side} x {side} pixels, batch 2, 300 queries, medians of {repeats}: "
        + ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in medians.items())
    )
    print(
        f"ratio {medians['with D3ETR'] / medians['plain']:.2f} "
        "(multiply-adds at 800 x 1333: 1.71 for ResNet-18 from 50, 1.63 for 50 from 101)"
    )
    copies = _copies_of(lambda: _step(student, taught, batch))
    print(
        f"copies to the host in a step with D3ETR: {len(copies)} "
        f"(numbers in each: {', '.join(map(str, copies))})"
    )


def _copies_of(work: Callable[[], None]) -> list[int]:
    """How many numbers each copy from the device to the host has, while it works."""
    copies: list[int] = []
    to_host = Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        copies.append(tensor.numel())
        return to_host(tensor)

    with patch.object(Tensor, "cpu", counted):
        work()
    return copies


def _pictures(side: int) -> DetectionBatch:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([[side, side]] * 2)
    boxes = tuple(0.2 + 0.3 * torch.rand(5, 4, generator=generator) for _ in range(2))
    return DetectionBatch(
        images=Images(
            torch.randn(2, 3, side, side, generator=generator), padding_of(sizes, side, side), sizes
        ),
        targets=Targets(boxes, tuple(torch.tensor([0, 1, 2, 3, 0]) for _ in range(2))),
        keys=("a", "b"),
        sample_ids=torch.arange(2),
    )


def _step(model: Detector, objective: Objective[DetectionBatch], batch: DetectionBatch) -> None:
    model.zero_grad()
    share = Share(objective.counts(batch))
    objective(model, batch, share, torch.Generator()).total.backward()


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("learn", "cost"))
    parser.add_argument("--output", type=Path, default=Path("distillation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.what == "learn":
        learn(arguments.output, arguments.seeds, arguments.steps)
    else:
        cost(arguments.side, arguments.repeats)


if __name__ == "__main__":
    main()
