"""What `querypatch evaluate`, `predict`, `export` and `weights` do, for the person who waits."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from cluster.commands.bars import open_bar, say
from data.detection_set import SetKind
from finetune.artefacts import open_weights
from finetune.classifier_predict import predict_classes
from finetune.evaluate_weights import judge_weights
from finetune.export import ExportFormat, export
from finetune.one_shot_predict import load_one_shot
from finetune.panoptic_postprocess import SegmentSettings
from finetune.panoptic_predict import predict_panoptic
from finetune.picture_loading import LeftOutPicture
from finetune.picture_sources import find_pictures
from finetune.predict import Device, device_of
from finetune.predict_pictures import check_free, predict_pictures, write_predictions
from finetune.weights_report import weights_report

BOX_THRESHOLD = 0.5
"""Least score of a box where none is asked for; that of segments is their own."""

_LEFT_OUT_SHOWN = 20


class PredictionsReport(Protocol):
    """What every way to predict tells."""

    @property
    def num_pictures(self) -> int:
        """Pictures with an answer."""
        ...

    @property
    def left_out(self) -> tuple[LeftOutPicture, ...]:
        """Pictures that could not be used, with the reason."""
        ...


def evaluate_weights(
    weights: str,
    data: str,
    overrides: Sequence[str],
    device: Device,
    out: Path | None,
    tables: Console,
    console: Console,
    kind: SetKind | None = None,
    pictures: str | None = None,
) -> None:
    """Prints the numbers of weights on a labelled set to `tables`; errors pass through."""
    with open_bar(console, "pictures") as advance:
        judged = judge_weights(
            weights, data, overrides, device_of(device), advance, kind=kind, pictures=pictures
        )
    say(tables, judged.text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(judged.content, indent=1) + "\n", encoding="utf-8")
        say(console, f"wrote {out}")


def predict_files(
    weights: str,
    pictures: Sequence[str],
    out: Path,
    threshold: float | None,
    batch_size: int,
    queries: Sequence[str],
    device: Device,
    overwrite: bool,
    console: Console,
) -> bool:
    """Writes drawings and json of what is found into `out`; true where a picture was left out."""
    with open_bar(console, "pictures") as advance:
        report = _predict(
            weights, pictures, out, threshold, batch_size, queries, device, overwrite, advance
        )
    for picture in report.left_out[:_LEFT_OUT_SHOWN]:
        say(console, f"left out {picture}")
    if len(report.left_out) > _LEFT_OUT_SHOWN:
        say(console, f"... and {len(report.left_out) - _LEFT_OUT_SHOWN} more")
    say(console, f"{report.num_pictures} pictures in {out}, {len(report.left_out)} left out")
    return bool(report.left_out)


def export_weights(
    source: str,
    destination: str,
    format: ExportFormat,
    pictures: Sequence[str],
    overwrite: bool,
    console: Console,
) -> None:
    """Writes weights in another form and says what was written and checked."""
    written = export(source, destination, format, overwrite=overwrite, pictures=pictures)
    for line in (*written.checks, *(f"wrote {place}" for place in written.files)):
        say(console, line)


def weights_text(source: str) -> str:
    """What weights are, line by line."""
    return weights_report(source)


def _predict(
    weights: str,
    pictures: Sequence[str],
    out: Path,
    threshold: float | None,
    batch_size: int,
    queries: Sequence[str],
    device: Device,
    overwrite: bool,
    advance: Callable[[int, int], None],
) -> PredictionsReport:
    """By what the weights are; a list of pictures is read from stdin where `-` is among them."""
    least = BOX_THRESHOLD if threshold is None else threshold
    listed = [line.strip() for line in sys.stdin if line.strip()] if "-" in pictures else []
    if queries:
        check_free(out, overwrite)
        refs = find_pictures(pictures, listed)
        detector = load_one_shot(weights, queries, device=device)
        return write_predictions(detector, refs, out, least, batch_size, advance)
    kind = open_weights(weights).kind
    if kind == "classifier":
        return predict_classes(
            weights,
            pictures,
            out,
            batch_size=batch_size,
            device=device,
            overwrite=overwrite,
            listed=listed,
            progress=advance,
        )
    if kind == "panoptic":
        return predict_panoptic(
            weights,
            pictures,
            out,
            settings=SegmentSettings()
            if threshold is None
            else SegmentSettings(threshold=threshold),
            device=device,
            overwrite=overwrite,
            listed=listed,
            progress=advance,
        )
    return predict_pictures(
        weights,
        pictures,
        out,
        threshold=least,
        batch_size=batch_size,
        device=device,
        overwrite=overwrite,
        listed=listed,
        progress=advance,
    )
