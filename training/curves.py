"""Learning curves: the numbers of one run or of several side by side, from their own records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.metrics import read_metrics
from training.run_folder import RunFolder, open_run_folder

_COLUMNS = 3
_PANEL = (4.2, 3.0)
"""Width and height of one panel in inches."""


@dataclass(frozen=True)
class Curve:
    """One number of a run's record."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


def read_curve(folder: RunFolder, name: str) -> Curve:
    """A number of the record by its name, e.g. `loss` or `eval/ap50`; empty where there is none."""
    points = [
        (float(step), float(value))
        for line in read_metrics(folder)
        if isinstance(step := line.get("step"), int)
        and isinstance(value := line.get(name), int | float)
    ]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def draw_runs(urls: Sequence[str], names: Sequence[str], out: Path) -> None:
    """A PNG with one panel per number, in it one line per run, called by the runs' folders.

    Raises ValueError, naming it, where a run has no record, or no run has one of the numbers.
    """
    runs = {_called(url, urls): open_run_folder(url) for url in urls}
    for folder in runs.values():
        if not read_metrics(folder):
            raise ValueError(f"{folder.url} has no record of a run; check the URL")
    panels = {
        name: {called: read_curve(folder, name) for called, folder in runs.items()}
        for name in names
    }
    for name, curves in panels.items():
        if not any(curve.steps for curve in curves.values()):
            known = sorted({key for folder in runs.values() for key in _numbers(folder)})
            raise ValueError(f"no run has the number {name!r}; they have {', '.join(known)}")
    draw_panels(panels, out)


def draw_panels(panels: Mapping[str, Mapping[str, Curve]], out: Path) -> None:
    """A PNG with one panel per name, in it one line per curve; single points are dots."""
    columns = min(_COLUMNS, len(panels))
    rows = ceil(len(panels) / columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    several = max(len(curves) for curves in panels.values()) > 1
    for number, (name, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for called, curve in curves.items():
            marker = "." if len(curve.steps) < 40 else ""
            axes.plot(curve.steps, curve.values, marker=marker, label=called)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if several:
            axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _called(url: str, urls: Sequence[str]) -> str:
    """The last part of the URL, or as much of it as tells it from the others."""
    parts = url.rstrip("/").split("/")
    for count in range(1, len(parts) + 1):
        ending = "/".join(parts[-count:])
        if sum(other.rstrip("/").endswith(ending) for other in urls) == 1:
            return ending
    return url


def _numbers(folder: RunFolder) -> set[str]:
    return {
        name
        for line in read_metrics(folder)
        for name, value in line.items()
        if isinstance(value, float) and "/" in name
    } | {"loss"}
