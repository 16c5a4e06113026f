"""What `querypatch study` does, for the person who waits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cluster.commands.bars import open_bar, say
from finetune.decoder_depth import DecoderDepthStudy, draw_decoder_depth, study_decoder_depth
from finetune.keep_ratio import SHARES, KeepRatioStudy, draw_keep_ratio, study_keep_ratio
from finetune.predict import Device, device_of


def draw_keep_ratios(
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
    numbers = _written(study.content(), out)
    say(tables, _ratio_table(study))
    say(console, f"wrote {out} and {numbers}")


def draw_depths(
    weights: str,
    data: str,
    overrides: Sequence[str],
    device: Device,
    out: Path,
    tables: Console,
    console: Console,
) -> None:
    """Draws what each decoder layer finds to `out`, beside it as JSON; prints it to `tables`.

    Errors of `study_decoder_depth` pass through.
    """
    with open_bar(console, "pictures") as advance:
        study = study_decoder_depth(weights, data, overrides, device_of(device), advance)
    draw_decoder_depth(study, out)
    numbers = _written(study.content(), out)
    say(tables, _depth_table(study))
    say(console, f"wrote {out} and {numbers}")


def _written(content: Mapping[str, object], out: Path) -> Path:
    numbers = out.with_suffix(".json")
    numbers.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return numbers


def _depth_table(study: DecoderDepthStudy) -> str:
    name = next(iter(study.depths[0].numbers))
    lines = [_row("decoder layers", name, "GFLOPs")]
    for depth in study.depths:
        found, spent = 100 * depth.numbers[name], depth.multiply_adds / 1e9
        lines.append(_row(str(depth.layers), f"{found:.1f}", f"{spent:.2f}"))
    lines += ["", _row("part", "parameters M", "GFLOPs")]
    for part in study.parts:
        spent = part.multiply_adds / 1e9
        lines.append(_row(part.name, f"{part.parameters / 1e6:.2f}", f"{spent:.2f}"))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "".join(f"{cell:>16}" for cell in cells)


def _ratio_table(study: KeepRatioStudy) -> str:
    name = next(iter(study.points[0].numbers))
    columns = ("rho", name, "Corr", "ms", "encoder ms", "GFLOPs", "encoder GFLOPs")
    lines = [_row(*columns)]
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
        lines.append(_row(*cells))
    return "\n".join(lines)
