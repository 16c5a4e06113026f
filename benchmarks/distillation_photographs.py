"""Photographs learned by heart with and without D3ETR.

    python -m benchmarks.distillation_photographs --data VOC2012#train --weights resnet50_layer3.pth

A Conditional DETR of two encoder and two decoder layers on frozen features learns 16 photographs in
360 steps and is the teacher; students with one encoder and one decoder layer of half the width have
120 steps, without and with it. AP50 of the same photographs. Writes DIR/distillation_real.json.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks.overfit import overfit_recipe
from cluster.worker import run_alone
from finetune.keeping import history_of
from training.run_folder import open_run_folder


def learn_by_heart(output: Path, data: str, weights: str, seeds: int) -> None:
    """Prints a table, and writes the numbers."""
    quiet, steps = Console(quiet=True), 120
    teacher = output / "teacher"
    run_alone(overfit_recipe(data, weights, teacher, 16, 0, 360, 160, family="conditional"), quiet)
    print(f"teacher: AP50 {_ap50(teacher)[-1][1]:.3f}", flush=True)
    smaller = ("model.encoder_layers=1", "model.decoder_layers=1", "model.hidden_dim=64")
    told = {"no teacher": (), "D3ETR": (f"distill.teacher={teacher}",)}
    found: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in told}
    for seed in range(seeds):
        for name, overrides in told.items():
            run = output / f"{name.replace(' ', '_')}_{seed}"
            others = (*smaller, f"seed={seed}", f"loop.evaluate_every={steps // 6}", *overrides)
            run_alone(
                overfit_recipe(
                    data, weights, run, 16, 0, steps, 160, overrides=others, family="conditional"
                ),
                quiet,
            )
            found[name].append(_ap50(run))
            curve = "  ".join(f"{value:.3f}" for _, value in found[name][-1])
            print(f"seed {seed}  {name:12} AP50 every {steps // 6} steps: {curve}", flush=True)
    (output / "distillation_real.json").write_text(json.dumps(found))


def _ap50(run: Path) -> list[tuple[int, float]]:
    return list(history_of(open_run_folder(str(run)), "eval/ap50"))


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a labelled set, e.g. VOC2012#train")
    parser.add_argument("--weights", required=True, help="ResNet-50, stride in the 1x1")
    parser.add_argument("--output", type=Path, default=Path("distillation"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    learn_by_heart(arguments.output, arguments.data, arguments.weights, arguments.seeds)


if __name__ == "__main__":
    main()
