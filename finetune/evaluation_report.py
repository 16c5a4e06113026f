"""An evaluation as text for a terminal, as markdown for a page, and as JSON with everything.

A number that does not exist (no object of that kind) is "-" in tables, null in JSON.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from finetune.coco_ap import CocoScores
from finetune.evaluation import Evaluation
from finetune.scores import ClassScores
from finetune.voc_ap import VocScores

SHOWN_PICTURES = 5
"""Of the pictures that could not be read, in text; JSON has all."""


@dataclass(frozen=True)
class _Table:
    """Words in rows; the first row is the head, the first column is of names."""

    title: str
    rows: tuple[tuple[str, ...], ...]


def evaluation_text(evaluation: Evaluation) -> str:
    """Tables for a terminal, and below them what did not count."""
    parts = [f"{table.title}\n{_aligned(table.rows)}" for table in _tables(evaluation)]
    return "\n\n".join([*parts, *_remarks(evaluation)])


def evaluation_markdown(evaluation: Evaluation) -> str:
    """The same tables for a page."""
    parts = [f"**{table.title}**\n\n{_piped(table.rows)}" for table in _tables(evaluation)]
    return "\n\n".join([*parts, *_remarks(evaluation)]) + "\n"


def evaluation_json(evaluation: Evaluation) -> dict[str, object]:
    """Everything, as values of JSON: all numbers by name, each protocol's classes, the remarks."""
    classes = {name: list(map(asdict, scores)) for name, scores in _class_scores(evaluation)}
    content = {
        "data": evaluation.data,
        "pictures": evaluation.pictures,
        "difficult": evaluation.difficult,
        "numbers": evaluation.numbers(),
        "selection": dict(evaluation.selection),
        "max_detections": evaluation.coco.max_detections if evaluation.coco else None,
        "classes": classes,
        "skipped": list(evaluation.skipped),
        "missing_classes": list(evaluation.missing),
        "left_out_detections": dict(evaluation.left_out),
        "not_finite_detections": evaluation.not_finite,
    }
    return {key: _without_nan(value) for key, value in content.items()}


def _tables(evaluation: Evaluation) -> list[_Table]:
    tables = []
    if evaluation.coco:
        tables.append(_coco_table(evaluation.coco, evaluation))
    if evaluation.voc:
        tables.append(_voc_table(evaluation.voc, evaluation))
    if evaluation.selection:
        tables.append(_selection_table(evaluation))
    return [*tables, _class_table(evaluation)]


def _coco_table(scores: CocoScores, evaluation: Evaluation) -> _Table:
    rows = tuple((name, _shown(value)) for name, value in scores.numbers().items())
    return _Table(f"COCO, {_set_words(evaluation)}", (("number", "value"), *rows))


def _voc_table(all_scores: Sequence[VocScores], evaluation: Evaluation) -> _Table:
    rows = tuple(
        (name, _shown(value)) for scores in all_scores for name, value in scores.numbers().items()
    )
    return _Table(f"VOC, {_set_words(evaluation)}", (("number", "value"), *rows))


def _selection_table(evaluation: Evaluation) -> _Table:
    """Sparse DETR, equation 5."""
    rows = tuple((name, _shown(value)) for name, value in evaluation.selection.items())
    title = "Corr: attention of the decoder that meets updated tokens"
    return _Table(title, (("of", "value"), *((_of(name), value) for name, value in rows)))


def _of(name: str) -> str:
    last = name.rpartition("_")[2]
    return "all levels" if last == "all" else f"level {last}"


def _class_table(evaluation: Evaluation) -> _Table:
    protocols = _class_scores(evaluation)
    heads = tuple(f"{name} {number}" for name, _ in protocols for number in ("ap", "ap50"))
    columns = [scores for _, scores in protocols]
    rows = []
    for places in zip(*columns, strict=True):
        numbers = [value for each in places for value in (each.ap, each.ap50)]
        rows.append((places[0].name, str(places[0].objects), *map(_shown, numbers)))
    return _Table("By class", (("class", "objects", *heads), *rows))


def _class_scores(evaluation: Evaluation) -> list[tuple[str, tuple[ClassScores, ...]]]:
    coco = [("coco", evaluation.coco.per_class)] if evaluation.coco else []
    return [*coco, *((scores.protocol, scores.per_class) for scores in evaluation.voc)]


def _set_words(evaluation: Evaluation) -> str:
    return f"{evaluation.pictures} pictures of {evaluation.data}, difficult: {evaluation.difficult}"


def _remarks(evaluation: Evaluation) -> list[str]:
    """One line each; none where all went as it should."""
    remarks = []
    if evaluation.skipped:
        shown = "; ".join(evaluation.skipped[:SHOWN_PICTURES])
        more = len(evaluation.skipped) - SHOWN_PICTURES
        remarks.append(
            f"{len(evaluation.skipped)} pictures could not be read and are left out: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )
    if evaluation.missing:
        remarks.append(
            f"the detector does not know {', '.join(evaluation.missing)}: their objects count as "
            "not found"
        )
    if evaluation.left_out:
        named = ", ".join(f"{name} {count}" for name, count in evaluation.left_out.items())
        remarks.append(f"detections of classes that the data do not have, left out: {named}")
    if evaluation.not_finite:
        remarks.append(
            f"{evaluation.not_finite} detections are not numbers and are left out: the weights are "
            "damaged, or training has diverged"
        )
    return remarks


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = row
    cells = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
    return "  ".join([name.ljust(widths[0]), *cells])


def _piped(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows)
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    return "\n".join([head, rule, *body])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _shown(value: float) -> str:
    """In percent, as in the papers' tables."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _without_nan(value: object) -> object:
    match value:
        case float() if math.isnan(value):
            return None
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list():
            return [_without_nan(item) for item in value]
        case _:
            return value
