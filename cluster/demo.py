"""The main job in minutes: pictures, shards, pretraining through Ray, a kill, a resume, the proof.

Every step is the command that a user would type, run as a process of its own.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cluster.processes import kill_tree
from data.sources import list_source
from data.synthetic import write_scenes
from pretrain.drawing import draw_curves
from training.checkpoint import newest_checkpoint
from training.metrics import read_metrics
from training.run_folder import RunFolder, open_run_folder

PICTURES = 1200
HELD_OUT = 64
"""Pictures that are held out, at most; of few pictures it is an eighth."""
FEWEST = 24
"""Pictures without which there is no batch and nothing to hold out."""
STEPS = 800
"""Length of the demo's run: three to four minutes on two cores."""
KILL_AFTER = 400
"""Updates after which the job is killed."""
CURVES = ("loss", "eval/ap50", "eval/ap", "eval/mean_iou", "eval/recall50", "eval/own_patch")


class DemoError(RuntimeError):
    """A step of the demo that did not do what it should."""


def run_demo(out: Path, pictures: Path | None, console: Console) -> None:
    """Runs the demo into the folder `out`, on the pictures of a folder, or on drawn ones.

    Raises DemoError where the folder is in use, a step fails, or the model does not learn.
    """
    out = out.absolute()
    run = out / "run"
    if run.exists():
        raise DemoError(f"{run} exists already; remove {out}, or give another --out")
    if pictures is None:
        pictures = out / "pictures"
        console.rule(f"1. Draw {PICTURES} pictures")
        write_scenes(pictures, seed=0, count=PICTURES)
    console.rule("2. Write shards")
    count = len(list_source(str(pictures)).items)
    if count < FEWEST:
        raise DemoError(f"{pictures} holds {count} pictures; the demo needs {FEWEST} or more")
    held_out = min(HELD_OUT, count // 8)
    _command(console, "shards", "write", pictures, out / "shards", "--hold-out", held_out)
    console.rule("3. Pretrain through Ray with two workers, and kill the job")
    folder = open_run_folder(str(run))
    _pretrain_until_killed(out, folder, console)
    console.rule("4. Resume it")
    _command(console, "resume", run)
    console.rule("5. Look at it")
    _command(console, "show", "patches", run, "-o", out / "patches.png")
    _tell(folder, out, held_out, console)


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


def _tell(folder: RunFolder, out: Path, held_out: int, console: Console) -> None:
    """Writes the curves and says how the detection of patches rose."""
    lines = read_metrics(folder)
    curves = {name: _curve(lines, name) for name in CURVES}
    draw_curves(curves, out / "curves.png")
    _, ap50 = curves["eval/ap50"]
    console.print(
        f"patch-detection AP50 on {held_out} held-out pictures: {ap50[0]:.3f} at the start, "
        f"{ap50[-1]:.3f} at the end",
        style="bold",
    )
    console.print(f"wrote {out / 'patches.png'} and {out / 'curves.png'}")
    if ap50[-1] < 2 * ap50[0] + 0.05:
        raise DemoError("patch detection did not rise well above its start; this is a defect")


def _curve(lines: Sequence[Mapping[str, object]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one number of the record."""
    points = [
        (float(step), float(value))
        for line in lines
        if isinstance(step := line.get("step"), int) and isinstance(value := line.get(name), float)
    ]
    return [step for step, _ in points], [value for _, value in points]


def _command(console: Console, *arguments: object) -> None:
    done = subprocess.run(_line(console, arguments), check=False)
    if done.returncode:
        raise DemoError(f"the command ended with status {done.returncode}")


def _line(console: Console, arguments: Sequence[object]) -> list[str]:
    words = [str(argument) for argument in arguments]
    console.print("$ querypatch " + " ".join(words), style="bold cyan", soft_wrap=True)
    return [sys.executable, "-m", "querypatch", *words]
