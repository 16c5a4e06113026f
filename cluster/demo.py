"""The whole service in minutes: pretraining, a kill, a resume, finetuning with it and without.

Every step is the command that a user would type, run as a process of its own.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.processes import kill_tree
from data.sources import list_source
from data.synthetic import write_labelled_scenes
from training.checkpoint import newest_checkpoint
from training.curves import draw_panels, read_curve
from training.run_folder import RunFolder, open_run_folder

PICTURES = 1200
VALIDATION = 100
"""Drawn pictures that detectors are judged on."""
LABELLED = 300
"""Drawn pictures whose boxes are learned: labels are what there is little of."""
HELD_OUT = 64
"""Pictures that are held out of pretraining, at most; of few pictures it is an eighth."""
FEWEST = 24
"""Pictures without which there is no batch and nothing to hold out."""
STEPS = 800
"""Length of the demo's pretraining: three to four minutes on two cores."""
KILL_AFTER = 400
"""Updates after which the job is killed."""
FINETUNE_STEPS = 400
"""Length of each of the two finetunings: about a minute and a half on two cores."""
PRETRAINING = ("loss", "eval/ap50", "eval/ap", "eval/mean_iou", "eval/recall50", "eval/own_patch")
FINETUNING = ("loss", "eval/ap", "eval/ap50")
TABLE = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar100")
PREDICTED = 6
"""Pictures of the validation set whose predictions are drawn."""


class DemoError(RuntimeError):
    """A step of the demo that did not do what it should."""


def run_demo(out: Path, pictures: Path | None, console: Console) -> None:
    """Runs the demo into the folder `out`; pretrains on the pictures of a folder, or on drawn ones.

    Raises DemoError where the folder is in use, a step fails, or the model does not learn.
    """
    out = out.absolute()
    run = out / "pretrained"
    if run.exists():
        raise DemoError(f"{run} exists already; remove {out}, or give another --out")
    _check_enough(pictures)
    console.rule(f"1. Draw {PICTURES + VALIDATION} pictures with boxes")
    made = out / "made"
    write_labelled_scenes(made, "train", seed=0, count=PICTURES)
    write_labelled_scenes(made, "val", seed=1, count=VALIDATION)
    held_out = _write_shards(out, pictures or made / "train", console)
    console.rule("3. Pretrain through Ray with two workers, and kill the job")
    folder = open_run_folder(str(run))
    _pretrain_until_killed(out, folder, console)
    console.rule("4. Resume it")
    _command(console, "resume", run)
    console.rule("5. Look at it")
    _command(console, "show", "patches", run, "-o", out / "patches.png")
    _tell_pretraining(folder, out, held_out, console)
    console.rule(f"6. Finetune on {LABELLED} labelled pictures, with pretraining and without")
    _finetune(out, "tiny_cpu", "finetuned", console, f"init={run}")
    _finetune(out, "tiny_cpu_scratch", "from_scratch", console)
    console.rule("7. Compare, and use it")
    _tell_finetuning(out, console)
    shown = [made / "val" / f"scene_{number:06d}.jpg" for number in range(PREDICTED)]
    _command(
        console, "predict", out / "finetuned", *shown, "-o", out / "predictions",
        "--threshold", "0.3",
    )  # fmt: skip
    console.print(f"predictions are drawn in {out / 'predictions'}")


def _check_enough(pictures: Path | None) -> None:
    if pictures is None:
        return
    count = len(list_source(str(pictures)).items)
    if count < FEWEST:
        raise DemoError(f"{pictures} holds {count} pictures; the demo needs {FEWEST} or more")


def _write_shards(out: Path, pictures: Path, console: Console) -> int:
    """Returns how many pictures are held out."""
    console.rule("2. Write shards; nothing of the boxes goes into them")
    held_out = min(HELD_OUT, len(list_source(str(pictures)).items) // 8)
    _command(console, "shards", "write", pictures, out / "shards", "--hold-out", held_out)
    return held_out


def _pretrain_until_killed(out: Path, folder: RunFolder, console: Console) -> None:
    shards = out / "shards"
    arguments = (
        "pretrain", "tiny_cpu", f"run={folder.url}", f"data.shards={shards / 'train'}",
        f"data.held_out={shards / 'held_out'}", f"loop.steps={STEPS}",
    )  # fmt: skip
    job = subprocess.Popen(_line(console, arguments), start_new_session=True)
    while job.poll() is None:
        time.sleep(0.5)
        newest = newest_checkpoint(folder)
        if newest is not None and newest.step >= KILL_AFTER:
            killed = kill_tree(job.pid)
            job.wait()
            console.print(f"killed {len(killed)} processes with SIGKILL", style="bold")
            console.print(f"the newest whole checkpoint is {newest.name}", style="bold")
            return
    raise DemoError(f"the job ended with status {job.returncode} before it could be killed")


def _tell_pretraining(folder: RunFolder, out: Path, held_out: int, console: Console) -> None:
    """Writes the curves and says how the detection of patches rose."""
    curves = {name: {"pretraining": read_curve(folder, name)} for name in PRETRAINING}
    draw_panels(curves, out / "pretraining.png")
    ap50 = curves["eval/ap50"]["pretraining"].values
    console.print(
        f"patch-detection AP50 on {held_out} held-out pictures: {ap50[0]:.3f} at the start, "
        f"{ap50[-1]:.3f} at the end",
        style="bold",
    )
    console.print(f"wrote {out / 'patches.png'} and {out / 'pretraining.png'}")
    if ap50[-1] < 2 * ap50[0] + 0.05:
        raise DemoError("patch detection did not rise well above its start; this is a defect")


def _finetune(out: Path, recipe: str, name: str, console: Console, *more: str) -> None:
    annotations = out / "made" / "annotations"
    _command(
        console, "finetune", recipe, f"run={out / name}", *more,
        f"data.train={annotations / 'instances_train.json'}",
        f"data.validation={annotations / 'instances_val.json'}",
        f"data.subset.share={LABELLED / PICTURES}", f"loop.steps={FINETUNE_STEPS}",
    )  # fmt: skip


def _tell_finetuning(out: Path, console: Console) -> None:
    """The two detectors side by side: a table of their last numbers, and their curves."""
    runs = {name: open_run_folder(str(out / name)) for name in ("finetuned", "from_scratch")}
    panels = {
        number: {name: read_curve(folder, number) for name, folder in runs.items()}
        for number in FINETUNING
    }
    draw_panels(panels, out / "finetuning.png")
    table = Table("", *runs, title=f"Detection on {VALIDATION} pictures, in percent")
    numbers = {name: _last_numbers(folder) for name, folder in runs.items()}
    for number in TABLE:
        table.add_row(number, *(_percent(found.get(number)) for found in numbers.values()))
    console.print(table)
    console.print(
        "Minutes on random frozen features teach a detector little: this shows that the job works, "
        "docs/finetuning.md how to make one that finds things."
    )
    console.print(f"wrote {out / 'finetuning.png'}")


def _last_numbers(folder: RunFolder) -> Mapping[str, float | None]:
    """Of the newest evaluation."""
    content = json.loads(folder.read(f"evaluations/step_{FINETUNE_STEPS:06d}.json"))
    numbers: Mapping[str, float | None] = content["numbers"]
    return numbers


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _command(console: Console, *arguments: object) -> None:
    done = subprocess.run(_line(console, arguments), check=False)
    if done.returncode:
        raise DemoError(f"the command ended with status {done.returncode}")


def _line(console: Console, arguments: tuple[object, ...]) -> list[str]:
    words = [str(argument) for argument in arguments]
    console.print("$ querypatch " + " ".join(words), style="bold cyan", soft_wrap=True)
    return [sys.executable, "-m", "querypatch", *words]
