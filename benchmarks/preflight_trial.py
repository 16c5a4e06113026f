"""What `querypatch preflight` tries on a worker's GPU, without Ray: memory, speed, who waits.

    python -m benchmarks.preflight_trial [--pictures N] [RECIPE [KEY=VALUE ...]]

Draws N pictures with boxes into a temporary folder, as shards for a recipe of
pretraining or as a COCO json for one of finetuning, and prints the checks "weights", "memory",
"speed" and "forecast" as preflight does, with the seconds that each took. The backbone is random.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from cluster.preflight.checks import Check, check_line, looked_at
from cluster.preflight.forecast import forecast, forecast_checks, pace_checks
from cluster.preflight.kit import open_kit
from cluster.preflight.memory import Seat, free_memory, memory_checks
from cluster.preflight.trial import Bench, Pace, measured_pace
from cluster.stages import Recipe, found_recipe, parsed_recipe
from data.shards import write_shards
from data.sources import list_source
from data.synthetic import write_labelled_scenes
from training.recipe import override, parse_recipe

RECIPES = ("pretrain/imagenet_r50", "finetune/coco_deformable_r50_scratch")


def main() -> None:
    """Reads the arguments, draws the pictures and tries each recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("recipe", nargs="?", help="STAGE/NAME; default: one of each stage")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_labelled_scenes(place, "train", seed=0, count=arguments.pictures)
        write_shards(list_source(str(place / "train")), str(place / "shards"))
        for name in [arguments.recipe] if arguments.recipe else RECIPES:
            print(f"{name} {' '.join(arguments.overrides)}", flush=True)
            try_out(_recipe(name, place, arguments.overrides))


def try_out(recipe: Recipe) -> None:
    """Prints the checks of one recipe."""
    began = time.monotonic()
    cuda = torch.cuda.is_available()
    seat = Seat(torch.device("cuda", 0) if cuda else torch.device("cpu"), 1, free_memory())
    kit = open_kit(recipe, seat.device)
    bench, paces = Bench(kit, seat.device), list[Pace]()

    def speed() -> list[Check]:
        paces.append(measured_pace(bench))
        return list(pace_checks(kit.recipe, paces[0]))

    memory = looked_at("memory", lambda: memory_checks(bench, seat), _print)
    looked_at("speed", speed, _print, memory)
    if paces:
        cores = kit.recipe.resources.cpus_per_worker
        found = forecast(kit.recipe, paces[0], kit.batches_per_epoch, seat, cores, price=None)
        looked_at("forecast", lambda: forecast_checks(found), _print)
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def _recipe(name: str, place: Path, overrides: list[str]) -> Recipe:
    stage, source = found_recipe(name)
    told = [f"run={place / 'run'}", "model.backbone.weights=random", "resources.workers=1"]
    if stage == "pretrain":
        told += [f"data.shards={place / 'shards'}"]
    else:
        told += [f"data.train={place / 'annotations/instances_train.json'}"]
    values = override(parse_recipe(source), [*told, *overrides])
    return parsed_recipe(values, (), stage)


def _print(check: Check) -> None:
    print(f"{check_line(check)} [{check.seconds:.1f} s] {dict(check.facts)}", flush=True)


if __name__ == "__main__":
    main()
