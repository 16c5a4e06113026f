"""Whether a detector can learn a handful of pictures by heart: a sanity check of the whole job.

    python -m benchmarks.overfit --data VOCdevkit/VOC2012#train --weights resnet50_layer3.pth

Trains the recipe finetune/tiny_cpu_scratch (two encoder and two decoder layers of width 128) on a
few pictures without augmentation, on frozen features of a ResNet-50 cut after layer3, and judges it
on the same pictures. `--family conditional`, `dab`, `deformable` or `sparse` takes the recipe of
that name, the last two on the maps of layer2 and layer3. Prints AP over the steps; fails where AP50
stays under 0.9. Small objects take a larger --side and many more steps: features have a stride of
16.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console

from cluster.stages import recipe_of
from cluster.worker import run_alone
from data.detection_set import open_detection_set
from finetune.keeping import history_of
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from training.run_folder import open_run_folder

Family = Literal["detr", "conditional", "dab", "deformable", "sparse"]

_RECIPES: dict[Family, str] = {
    "detr": "tiny_cpu_scratch",
    "conditional": "conditional_tiny_cpu_scratch",
    "dab": "dab_tiny_cpu_scratch",
    "deformable": "deformable_tiny_cpu_scratch",
    "sparse": "sparse_tiny_cpu_scratch",
}
_LEARNS: dict[Family, tuple[str, ...]] = {
    "detr": ("optimiser.lr=1e-3",),
    "conditional": ("optimiser.lr=1e-3",),
    "dab": ("optimiser.lr=1e-3",),
    "deformable": ("optimiser.lr=1e-3", "optimiser.sampling_lr=1e-4", "model.feature_levels=2"),
    "sparse": ("optimiser.lr=1e-3", "optimiser.sampling_lr=1e-4", "model.feature_levels=2"),
}

ENOUGH = 0.9
"""AP50 of pictures that are known by heart."""


def main() -> None:
    """Reads the arguments, trains and prints the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="labelled set, e.g. VOCdevkit/VOC2012#train")
    parser.add_argument("--weights", required=True, help="ResNet-50, stride in the 1x1")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--choice", type=int, default=0, help="seed of which pictures are taken")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--side", type=int, default=160, help="shorter side of a picture, pixels")
    parser.add_argument("--family", choices=get_args(Family), default="detr")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="laid over the recipe")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as run:
        recipe = overfit_recipe(
            arguments.data,
            arguments.weights,
            Path(run),
            num_pictures=arguments.pictures,
            choice=arguments.choice,
            steps=arguments.steps,
            side=arguments.side,
            overrides=arguments.overrides,
            family=arguments.family,
        )
        run_alone(recipe, Console())
        ap50, ap = (history_of(open_run_folder(run), f"eval/{name}") for name in ("ap50", "ap"))
    for (step, broad), (_, strict) in zip(ap50, ap, strict=True):
        print(f"step {step:5}  AP50 {broad:.3f}  AP {strict:.3f}")
    best = max(broad for _, broad in ap50)
    print(f"{arguments.pictures} pictures of {arguments.data}: AP50 {best:.3f}", end=", ")
    print("learned by heart" if best > ENOUGH else f"not over {ENOUGH}: look for a defect")
    sys.exit(best <= ENOUGH)


def overfit_recipe(
    data: str,
    weights: str,
    run: Path,
    num_pictures: int,
    choice: int,
    steps: int,
    side: int,
    overrides: Sequence[str] = (),
    family: Family = "detr",
) -> FinetuneRecipe:
    """A recipe that learns and judges the same pictures, in one process.

    Raises what `checked_recipe` raises.
    """
    share = num_pictures / open_detection_set(data).index.num_samples
    backbone = f"name: resnet50, output: layer3, stride_in_1x1: true, weights: {weights}"
    told = (
        f"run={run}",
        f"data.train={data}",
        "data.validation=same",
        f"data.subset={{share: {min(share, 1.0)!r}, seed: {choice}}}",
        f"data.augment={{kind: none, short_sides: [{side}], max_size: {side * 3 // 2}}}",
        "data.stream.processes=0",
        f"evaluation.sizes={{short_side: {side}, max_size: {side * 3 // 2}}}",
        "evaluation.processes=0",
        "evaluation.difficult=keep",
        f"model.backbone={{{backbone}, train: false}}",
        "model.num_queries=30",
        f"global_batch={min(8, num_pictures)}",
        *_LEARNS[family],
        f"loop.steps={steps}",
        f"loop.evaluate_every={max(1, steps // 5)}",
        "resources={workers: 1, cpus_per_worker: 1, device: cpu}",
    )
    recipe = recipe_of("finetune", _RECIPES[family], [*told, *overrides])
    assert isinstance(recipe, FinetuneRecipe)
    return checked_recipe(recipe)[0]


if __name__ == "__main__":
    main()
