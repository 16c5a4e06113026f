"""Steps and pictures a second of whole training steps on one GPU, by shipped recipe and precision.

    python -m benchmarks.training_rate --output DIR [--minutes N]

The real loop (`training.loop.train`) with the model, objective and optimiser of each recipe, on
drawn batches that are on the device already: loader, checkpoints and DDP are left out. Pretraining:
32 pictures of 480 x 600 with 10 patches of 128 pixels, a frozen backbone; finetuning: 16 pictures
of 800 x 1066, 8 objects each; every second picture is a sixteenth lower, so that there is padding.
The backbone is random, which changes no time. Writes DIR/training_rate.json after every recipe, so
that a run that ends early leaves what it had; --minutes begins nothing new after that time.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from finetune.objective import DetectionObjective
from finetune.recipe import RECIPES, FinetuneRecipe
from models.detection_losses import supervision_of
from models.detector import Detector
from models.sampling_parts import sampling_parts
from models.structures import DetectionBatch, Images, Losses, PatchBatch, Targets, padding_of
from pretrain.objective import PatchObjective
from pretrain.recipe import PretrainRecipe, recipe_of
from pretrain.weights import blank_model
from training.job import Job, Plan, Surroundings
from training.loop import NonFiniteLoss, train
from training.optimiser import build_optimiser
from training.parallel import parallel_model
from training.recipe import load_recipe
from training.schedule import schedule_in_steps
from training.shipped_recipes import recipe_source
from training.snapshot import Position, TrainingState
from training.window import memory_gib
from training.world import World

Precision = Literal["bf16", "float32"]

PRETRAINING = ("imagenet_r50", "imagenet_deformable_r50", "imagenet_sparse_r50")
FINETUNING = ("coco_r50_scratch", "coco_deformable_r50_scratch", "coco_sparse_r50_scratch")
OBJECTS = 8
CLASSES = 80
WARM_STEPS = 5


@dataclass(frozen=True)
class Size:
    """Of a batch."""

    pictures: int
    height: int
    width: int


@dataclass(frozen=True)
class Rate:
    """What was measured of one recipe."""

    recipe: str
    precision: Precision
    batch: str
    steps_per_s: float
    pictures_per_s: float
    gib: float
    """Most memory that tensors took."""
    seconds: list[float]
    """Of each measured step."""
    loss: float
    """The mean of all steps but the last."""


@dataclass
class Found:
    """What was found so far."""

    device: str
    torch: str
    rates: list[Rate] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def main(words: Sequence[str] | None = None) -> int:
    """0 where every recipe was measured, 1 where one was not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--recipes", nargs="*", default=[*PRETRAINING, *FINETUNING])
    parser.add_argument("--precisions", nargs="*", default=get_args(Precision))
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each")
    parser.add_argument("--shrink", type=int, default=1, help="divides pictures and sides")
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("training_rate: no CUDA device; this is for a machine with a GPU", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    world = World.alone(device)
    until = time.monotonic() + 60 * arguments.minutes
    found = Found(
        torch.cuda.get_device_name() if device.type == "cuda" else "cpu", torch.__version__
    )
    for precision in arguments.precisions:
        for name in arguments.recipes:
            if time.monotonic() > until:
                found.failures[f"{name} {precision}"] = "no time was left"
                continue
            try:
                rate = measure(name, precision, arguments.steps, arguments.shrink, world)
            except (torch.OutOfMemoryError, NonFiniteLoss) as error:
                found.failures[f"{name} {precision}"] = str(error).splitlines()[0]
            else:
                found.rates.append(rate)
                print(_line(rate), flush=True)
            arguments.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(found), indent=1) + "\n"
            (arguments.output / "training_rate.json").write_text(text, encoding="utf-8")
    for what, why in found.failures.items():
        print(f"{what}: {why}", flush=True)
    return 1 if found.failures else 0


@dataclass(frozen=True)
class Trained:
    """What a recipe trains, on batches of one size."""

    recipe: PretrainRecipe | FinetuneRecipe
    model: nn.Module
    backbone: nn.Module
    objective: Callable[[nn.Module, Any, torch.Generator], Losses]
    batch: PatchBatch | DetectionBatch
    size: Size


def measure(name: str, precision: Precision, steps: int, shrink: int, world: World) -> Rate:
    """Trains a recipe for `WARM_STEPS` and then for `steps` steps."""
    told = ("run=unused", f"loop.precision={precision}", "model.backbone.weights=random")
    trained = (_pretraining if name in PRETRAINING else _finetuning)(name, told, shrink, world)
    gc.collect()  # the model before this one
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clocked = Clocked(trained.batch, world.device)
    losses = _train(trained, clocked, WARM_STEPS + steps, world)
    seconds = [after - before for before, after in pairwise(clocked.times[WARM_STEPS:])]
    median = statistics.median(seconds)
    size = trained.size
    return Rate(
        recipe=name,
        precision=precision,
        batch=f"{size.pictures} of {size.height}x{size.width}",
        steps_per_s=round(1 / median, 3),
        pictures_per_s=round(size.pictures / median, 1),
        gib=round(memory_gib(world.device), 2),
        seconds=[round(second, 4) for second in seconds],
        loss=losses,
    )


class Clocked:
    """One batch without end; notes when it is asked for, with the device at rest."""

    def __init__(self, batch: PatchBatch | DetectionBatch, device: torch.device) -> None:
        self.batch = batch
        self.device = device
        self.times: list[float] = []

    def __iter__(self) -> "Clocked":
        return self

    def __next__(self) -> PatchBatch | DetectionBatch:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return self.batch


@dataclass
class Nowhere:
    """Where the checkpoints go."""

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        """Not kept."""

    def flush(self) -> None:
        """Nothing to wait for."""


def _train(trained: Trained, clocked: Clocked, steps: int, world: World) -> float:
    """The loop as a run has it; returns the last loss."""
    recipe = trained.recipe
    model = parallel_model(trained.model, world, recipe.loop.compile)
    sampling = sampling_parts(trained.model)
    optimiser = build_optimiser(trained.model, trained.backbone, recipe.optimiser, sampling)
    loop = recipe.loop.model_copy(
        update={"steps": steps + 1, "epochs": None, "log_every": steps, "max_bad_steps": 1}
    )
    plan = Plan(total_steps=steps + 1, batches_per_epoch=10**6, accumulate=1)
    told: list[float] = []
    job = Job(
        state=TrainingState(trained.model, optimiser, ema=None),
        model=model,
        objective=trained.objective,
        batches=clocked,
        plan=plan,
        schedule=schedule_in_steps(recipe.schedule.model_copy(update={"drop_at": ()}), steps, 1e6),
        settings=loop,
        clip_norm=recipe.optimiser.clip_norm,
        seed=recipe.seed,
        world=world,
    )
    around = Surroundings(
        checkpoints=Nowhere(),
        clock=time.monotonic,
        stop=lambda: False,
        report=lambda record: told.append(record.losses["total"]),
    )
    train(job, around, Position())
    return told[-1]


def _pretraining(name: str, told: Sequence[str], shrink: int, world: World) -> Trained:
    recipe = recipe_of(name, (*told, "data.shards=unused"))
    size = Size(max(2, 32 // shrink), 480 // shrink, 600 // shrink)
    make = torch.Generator().manual_seed(0)
    patches, side = recipe.queries.num_patches, recipe.data.patches.patch_size
    model = blank_model(recipe)
    batch = PatchBatch(
        images=_images(size, make, world.device),
        patches=torch.randn(size.pictures, patches, 3, side, side, generator=make).to(world.device),
        targets=_targets(size, patches, 1, make, world.device),
        keys=_keys(size),
        sample_ids=torch.arange(size.pictures),
    )
    objective = PatchObjective(recipe)
    return Trained(recipe, model, model.detector.backbone, objective, batch, size)


def _finetuning(name: str, told: Sequence[str], shrink: int, world: World) -> Trained:
    told = (*told, "data.train=unused", f"model.num_classes={CLASSES}")
    recipe = load_recipe(FinetuneRecipe, recipe_source(name, RECIPES), told)
    size = Size(max(2, 16 // shrink), 800 // shrink, 1066 // shrink)
    make = torch.Generator().manual_seed(0)
    model = Detector(recipe.model, torch.Generator().manual_seed(recipe.seed))
    batch = DetectionBatch(
        images=_images(size, make, world.device),
        targets=_targets(size, OBJECTS, CLASSES, make, world.device),
        keys=_keys(size),
        sample_ids=torch.arange(size.pictures),
    )
    supervision = supervision_of(model.settings)
    objective = DetectionObjective(
        recipe.costs, recipe.losses, model.settings.num_queries, supervision
    )
    return Trained(recipe, model, model.backbone, objective, batch, size)


def _keys(size: Size) -> tuple[str, ...]:
    return tuple(str(number) for number in range(size.pictures))


def _images(size: Size, make: torch.Generator, device: torch.device) -> Images:
    heights = [size.height - number % 2 * (size.height // 16) for number in range(size.pictures)]
    sizes = torch.tensor([[rows, size.width] for rows in heights])
    padding = padding_of(sizes, size.height, size.width)
    pixels = torch.randn(size.pictures, 3, size.height, size.width, generator=make)
    pixels *= ~padding[:, None]
    return Images(pixels.to(device), padding.to(device), sizes.to(device))


def _targets(
    size: Size, objects: int, labels: int, make: torch.Generator, device: torch.device
) -> Targets:
    """Label 1 where there is one label alone, as patches have it."""
    shape = (size.pictures, objects)
    extent = 0.1 + 0.4 * torch.rand(*shape, 2, generator=make)
    place = torch.rand(*shape, 2, generator=make)
    boxes = torch.cat((extent / 2 + place * (1 - extent), extent), dim=-1).to(device)
    drawn = torch.randint(labels, shape, generator=make)
    found = drawn.to(device) if labels > 1 else torch.ones_like(drawn, device=device)
    return Targets(boxes.unbind(0), found.unbind(0))


def _line(rate: Rate) -> str:
    return (
        f"{rate.recipe:28} {rate.precision:8} {rate.batch:16} {rate.steps_per_s:7.2f} steps/s "
        f"{rate.pictures_per_s:8.1f} pictures/s {rate.gib:7.2f} GiB"
    )


if __name__ == "__main__":
    raise SystemExit(main())
