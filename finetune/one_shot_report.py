"""A one-shot evaluation as metrics, as text for a terminal, and as JSON with everything."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from finetune.one_shot_scores import OneShotScores

SHOWN_PICTURES = 5
"""Of the pictures that could not be read, in text; JSON has all."""


@dataclass(frozen=True)
class OneShotEvaluation:
    """The numbers of a one-shot detector on a labelled set."""

    data: str
    """The set, as the user wrote it but for credentials."""
    pictures: int
    """That were judged: those in which something was asked for."""
    questions: int
    """Classes of pictures that were asked for."""
    skipped: tuple[str, ...]
    """Pictures that could not be read, and why; neither their objects count nor anything else."""
    broken_references: tuple[str, ...]
    """Pictures of references that could not be read, and why; other references stood in."""
    own_references: int
    """References from the very picture in which they were looked for: there was no other."""
    not_asked: tuple[str, ...]
    """Classes with objects but without a usable reference: not asked for, and not scored."""
    scores: tuple[OneShotScores, ...]
    """One for each protocol."""

    def metrics(self) -> dict[str, float]:
        """The numbers that exist, by name, e.g. `voc07_unseen_ap50`, and the skipped pictures."""
        numbers = {name: x for scores in self.scores for name, x in scores.numbers().items()}
        return {**numbers, "skipped": float(len(self.skipped))}


def one_shot_text(evaluation: OneShotEvaluation) -> str:
    """Tables for a terminal, and below them what did not go as it should."""
    head = (
        f"{evaluation.questions} questions in {evaluation.pictures} pictures of {evaluation.data}"
    )
    tables = [one_shot_table(scores) for scores in evaluation.scores]
    return "\n\n".join([head, *tables, *_remarks(evaluation)])


def one_shot_json(evaluation: OneShotEvaluation) -> dict[str, object]:
    """Everything, as values of JSON; null where a number does not exist."""
    content = asdict(evaluation)
    for scores in content["scores"]:
        for name in ("seen_ap50", "unseen_ap50"):
            scores[name] = _or_null(scores[name])
        for one in scores["per_class"]:
            one["ap50"] = _or_null(one["ap50"])
    return content


def one_shot_table(scores: OneShotScores) -> str:
    """The scores as text, in percent, seen classes first; a dash where a number does not exist."""
    rows = [("class", "", "objects", "AP50")]
    rows += [
        (one.name, "seen" if one.seen else "unseen", str(one.objects), _percent(one.ap50))
        for one in sorted(scores.per_class, key=lambda one: not one.seen)
    ]
    rows += [
        ("mean", "seen", "", _percent(scores.seen_ap50)),
        ("mean", "unseen", "", _percent(scores.unseen_ap50)),
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:{width}}  {kind:6}  {count:>7}  {ap50:>5}" for name, kind, count, ap50 in rows]
    title = f"one-shot, {scores.protocol}, mean of {scores.runs} references"
    return "\n".join([title, *lines])


def _remarks(evaluation: OneShotEvaluation) -> list[str]:
    """One line each; none where all went as it should."""
    remarks = []
    if evaluation.skipped:
        remarks.append(f"pictures that could not be read, left out: {_few(evaluation.skipped)}")
    if evaluation.broken_references:
        broken = _few(evaluation.broken_references)
        remarks.append(f"references that could not be read, replaced by others: {broken}")
    if evaluation.own_references:
        remarks.append(f"{evaluation.own_references} references are from the very picture")
    if evaluation.not_asked:
        remarks.append(f"no query crop, so not asked for: {', '.join(evaluation.not_asked)}")
    return remarks


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_PICTURES
    return "; ".join(names[:SHOWN_PICTURES]) + (f"; and {more} more" if more > 0 else "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
