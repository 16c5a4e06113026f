"""Seconds of one UP-DETR pretraining step, beside the public code on the same pictures and weights.

    python -m benchmarks.step --reference DIR_OF_A_CLONE

A step is forward, matching and losses, backward, clipping and AdamW, with 10 patches of 128 pixels,
dropout 0.1 and a frozen random ResNet-50. The two take turns in one process, so that other load on
the machine falls on both. On a CPU the figure is CPU time of all threads, on a GPU it is elapsed
time, and the share of the chip's peak is the step's arithmetic (counted on the public code, which
computes the same) over the rate of a large matrix product in the same precision. --precision
bfloat16 is ours as a recipe runs it where the hardware is good at it; the public code has float32
alone. --precision float32 shows what is left of the difference without that.
"""

import argparse
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import BackboneSettings
from models.detector_settings import DetectorSettings
from models.interop.detr import load_detr
from models.losses import LossWeights, Reconstruction, set_losses
from models.matching import MatchingCosts
from models.patch_queries import PatchDetector, QueryPatches, draw_patch_queries
from models.structures import Images, PatchBatch, Targets, padding_of
from training.optimiser import (
    OptimiserSettings,
    build_optimiser,
    clip_gradients,
    gradient_norm,
    trainable_parameters,
)

NUM_PATCHES = 10
PATCH_SIDE = 128
TARGETS = {"cpu": 1.8, "cuda": 5.0}
"""How many times faster than the public code ours has to be, in bfloat16."""

_PUBLIC_SETTINGS = {
    "dataset_file": "ImageNet",
    "masks": False,
    "frozen_weights": None,
    "lr_backbone": 0,
    "backbone": "resnet50",
    "dilation": False,
    "position_embedding": "sine",
    "hidden_dim": 256,
    "dropout": 0.1,
    "nheads": 8,
    "dim_feedforward": 2048,
    "enc_layers": 6,
    "dec_layers": 6,
    "pre_norm": True,
    "num_queries": 100,
    "aux_loss": True,
    "feature_recon": True,
    "query_shuffle": False,
    "set_cost_class": 1,
    "set_cost_bbox": 5,
    "set_cost_giou": 2,
    "bbox_loss_coef": 5,
    "giou_loss_coef": 2,
    "eos_coef": 0.1,
}
"""The command line of the public recipe."""

_REFERENCE_PACKAGES = ("models", "util", "datasets")
_PEAK_SIDE = 8192

Precision = Literal["float32", "bfloat16"]
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Conditions:
    """What is alike for both."""

    device: torch.device
    precision: Precision
    batch: int
    height: int
    width: int


def main() -> None:
    """Read the arguments, run the steps in turn, print the table."""
    arguments = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    conditions = Conditions(
        torch.device(arguments.device),
        arguments.precision,
        arguments.batch,
        arguments.height,
        arguments.width,
    )
    batch = make_batch(conditions, torch.Generator().manual_seed(0))
    model = _our_model(conditions)
    steps = {"ours": our_step(model, batch, conditions)}
    operations = None
    if arguments.reference is not None:
        reference = _reference_model(arguments.reference, conditions.device)
        load_detr(model, reference.model.state_dict(), source="the reference")
        steps["reference"] = reference_step(reference, batch)
        operations = _operations(steps["reference"])
    if arguments.compile:
        model.compile()
    seconds = _in_turn(steps, arguments.rounds, conditions.device)
    _print(seconds, conditions, operations)


def make_batch(conditions: Conditions, generator: torch.Generator) -> PatchBatch:
    """Random pictures, every second one a sixteenth lower, and random patches with boxes."""
    batch, height, width = conditions.batch, conditions.height, conditions.width
    heights = [height if number % 2 == 0 else height - height // 16 for number in range(batch)]
    sizes = torch.tensor([[rows, width] for rows in heights])
    padding = padding_of(sizes, height, width)
    pixels = torch.randn(batch, 3, height, width, generator=generator)
    patches = torch.randn(batch, NUM_PATCHES, 3, PATCH_SIDE, PATCH_SIDE, generator=generator)
    extent = 0.1 + 0.4 * torch.rand(batch, NUM_PATCHES, 2, generator=generator)
    place = torch.rand(batch, NUM_PATCHES, 2, generator=generator)
    boxes = torch.cat((extent / 2 + place * (1 - extent), extent), dim=-1).to(conditions.device)
    labels = torch.ones(batch, NUM_PATCHES, dtype=torch.int64, device=conditions.device)
    device = conditions.device
    return PatchBatch(
        images=Images(
            (pixels * ~padding[:, None]).to(device), padding.to(device), sizes.to(device)
        ),
        patches=patches.to(device),
        targets=Targets(boxes.unbind(0), labels.unbind(0)),
        keys=tuple(str(number) for number in range(batch)),
        sample_ids=torch.arange(batch),
    )


def our_step(model: PatchDetector, batch: PatchBatch, conditions: Conditions) -> Step:
    """One training step of ours, as the loop runs it."""
    settings = OptimiserSettings()
    optimiser = build_optimiser(model, None, settings)
    parameters = trainable_parameters(optimiser)
    generator = torch.Generator().manual_seed(1)
    mixed = conditions.precision == "bfloat16"

    def step() -> Tensor:
        draws = draw_patch_queries(model.patches, model.num_queries, conditions.batch, generator)
        with torch.autocast(conditions.device.type, torch.bfloat16, enabled=mixed):
            said = model(batch.images, batch.patches, draws)
        (group,) = said.detection.groups
        rebuilt = Reconstruction(said.reconstructions, said.patch_features)
        losses = set_losses(
            group, batch.targets, LossWeights(), MatchingCosts(), reconstruction=rebuilt
        )
        optimiser.zero_grad()
        torch.autograd.backward(losses.total)
        clip_gradients(parameters, gradient_norm(parameters), settings.clip_norm)
        optimiser.step()
        return losses.total.detach()

    return step


@dataclass(frozen=True)
class Reference:
    """The public model and criterion, and the class that holds its padded pictures."""

    model: nn.Module
    criterion: nn.Module
    loss_weights: dict[str, float]
    nested: Any


def reference_step(reference: Reference, batch: PatchBatch) -> Step:
    """One training step as the public loop does it, its per-step reading of the loss included."""
    model, criterion = reference.model, reference.criterion
    weights: dict[str, float] = reference.loss_weights
    optimiser = torch.optim.AdamW(
        [tensor for tensor in model.parameters() if tensor.requires_grad],
        lr=1e-4,
        weight_decay=1e-4,
    )
    images = reference.nested(batch.images.pixels, batch.images.padding)
    targets = [
        {"boxes": boxes, "labels": labels}
        for boxes, labels in zip(batch.targets.boxes_cxcywh, batch.targets.labels, strict=True)
    ]

    def step() -> Tensor:
        terms = criterion(model(images, batch.patches), targets)
        loss = torch.stack([terms[name] * weights[name] for name in terms if name in weights]).sum()
        for value in terms.values():
            value.item()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimiser.step()
        return loss.detach()

    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference", type=Path, help="clone of dddzg/up-detr; without it ours runs alone"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=2, help="pictures a step")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=600, help="pixels")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours")
    return parser.parse_args()


def _our_model(conditions: Conditions) -> PatchDetector:
    settings = DetectorSettings(
        backbone=BackboneSettings(weights="random", frozen_precision=conditions.precision),
        pre_norm=True,
        num_classes=2,
    )
    patches = QueryPatches(num_patches=NUM_PATCHES)
    return PatchDetector(settings, patches, torch.Generator().manual_seed(2)).to(conditions.device)


def _reference_model(folder: Path, device: torch.device) -> Reference:
    """The public model in pretraining, with random weights in place of the SwAV download."""
    weights = torchvision.models.resnet50(weights=None).state_dict()
    settings = argparse.Namespace(**_PUBLIC_SETTINGS, device=str(device), num_patches=NUM_PATCHES)
    with (
        _public_packages(folder) as (public_models, public_misc),
        mock.patch.object(torch.hub, "load_state_dict_from_url", return_value=weights),
    ):
        model, criterion, _ = public_models.build_model(settings)
    model = model.to(device).train()
    return Reference(model, criterion, criterion.weight_dict, public_misc.NestedTensor)


@contextmanager
def _public_packages(folder: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The clone's packages `models` and `util.misc`; ours of the same name come back afterwards."""
    ours = _taken_out(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("models"), importlib.import_module("util.misc")
    finally:
        sys.path.remove(str(folder))
        _taken_out(sys.modules)
        sys.modules.update(ours)


def _taken_out(loaded: dict[str, ModuleType]) -> dict[str, ModuleType]:
    names = [name for name in loaded if name.partition(".")[0] in _REFERENCE_PACKAGES]
    return {name: loaded.pop(name) for name in names}


def _operations(step: Step) -> int:
    """Floating-point operations of a step, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _in_turn(
    steps: dict[str, Step], rounds: int, device: torch.device
) -> dict[str, Sequence[float]]:
    """Seconds of every measured step; two steps of each come first, unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):
        for name, step in steps.items():
            spent = _seconds(step, device)
            if number >= 0:
                seconds[name].append(spent)
    return dict(seconds)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        before = time.process_time()
        step()
        return time.process_time() - before
    torch.cuda.synchronize(device)
    before = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - before


def _peak(conditions: Conditions) -> float:
    """Operations per second of a large square product in the precision of ours."""
    dtype = torch.bfloat16 if conditions.precision == "bfloat16" else torch.float32
    side = _PEAK_SIDE if conditions.device.type == "cuda" else _PEAK_SIDE // 8
    left = torch.randn(side, side, device=conditions.device).to(dtype)
    best = min(_seconds(lambda: left @ left, conditions.device) for _ in range(10))
    return 2 * side**3 / best


def _print(
    seconds: dict[str, Sequence[float]], conditions: Conditions, operations: int | None
) -> None:
    kind = "CPU seconds" if conditions.device.type == "cpu" else "seconds"
    print(
        f"{kind} per step on {conditions.device}, batch {conditions.batch}, "
        f"{conditions.height}x{conditions.width}, {NUM_PATCHES} patches, medians of "
        f"{len(seconds['ours'])}"
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        precision = conditions.precision if name == "ours" else "float32"
        print(f"  {name:<10} {precision:<9} {median:8.4f}   best {min(seconds[name]):8.4f}")
    if "reference" in medians:
        ratio = medians["reference"] / medians["ours"]
        wanted = TARGETS[conditions.device.type]
        print(f"  ours is {ratio:.2f} times faster (to reach in bfloat16: {wanted})")
    if operations is not None:
        share = operations / medians["ours"] / _peak(conditions)
        amount = f"{operations / 1e9:.0f} GFLOP a step"
        print(f"  {amount}, {100 * share:.0f} % of the measured matmul rate")


if __name__ == "__main__":
    main()
