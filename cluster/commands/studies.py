"""What `querypatch study` does, for the person who waits."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.commands.bars import open_bar, say
from finetune.keep_ratio import SHARES, KeepRatioStudy, draw_keep_ratio, study_keep_ratio
from finetune.predict import Device, device_of


def draw_study(
    weights: str,
    data: str,
    overrides: Sequence[str],
    shares: Sequence[float],
    device: Device,
    out: Path,
    tables: Console,
    console: Console,
) -> None:
    """Draws the sweep over rho to `out`, beside it as JSON; prints it to `tables`.

    Errors of `study_keep_ratio` pass through.
    """
    with open_bar(console, "keep ratios") as advance:
        study = study_keep_ratio(
            weights, data, overrides, device_of(device), shares or SHARES, advance
        )
    draw_keep_ratio(study, out)
    numbers = out.with_suffix(".json")
    numbers.write_text(json.dumps(study.content(), indent=1) + "\n", encoding="utf-8")
    say(tables, _table(study))
    say(console, f"wrote {out} and {numbers}")


def _table(study: KeepRatioStudy) -> str:
    name = next(iter(study.points[0].numbers))
    columns = ("rho", name, "Corr", "ms", "encoder ms", "GFLOPs", "encoder GFLOPs")
    lines = ["".join(f"{column:>16}" for column in columns)]
    for point in study.points:
        cost = point.cost
        cells = (
            f"{point.rho:.2f}",
            f"{100 * point.numbers[name]:.1f}",
            "-" if point.corr is None else f"{100 * point.corr:.1f}",
            f"{1000 * cost.seconds:.1f}",
            f"{1000 * cost.encoder_seconds:.1f}",
            f"{cost.multiply_adds / 1e9:.2f}",
            f"{cost.encoder_multiply_adds / 1e9:.2f}",
        )
        lines.append("".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
