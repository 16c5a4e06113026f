"""Soft labels: a teacher's class probabilities, and how far a student's logits are from them.

Probabilities are of each class by itself (sigmoid), or of the classes and "no object" (softmax).
All in float32 and in forms that stay finite at any logit: softplus and log-softmax, never the
logarithm of a probability.
"""

from typing import assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from models.matching import ClassScores

_SMALLEST = 1e-7
"""Of a probability, or of its distance from 1, that becomes a logit."""


def soft_labels(
    logits: Float[Tensor, "*queries theirs"],
    teacher_scores: ClassScores,
    class_scores: ClassScores,
    their_class: Int64[Tensor, " classes"],
) -> Float[Tensor, "*queries ours"]:
    """A teacher's probabilities of the student's classes; `their_class` is its label of each.

    Of a softmax teacher, what it gives to classes that the student has not goes to "no object";
    for a sigmoid student its "no object" is left out. ValueError for a sigmoid teacher of a softmax
    student: its probabilities do not exclude each other.
    """
    logits = logits.float()
    match (teacher_scores, class_scores):
        case ("sigmoid", "sigmoid"):
            return logits[..., their_class].sigmoid()
        case ("softmax", "sigmoid"):
            return logits.softmax(-1)[..., their_class]
        case ("softmax", "softmax"):
            known = logits.softmax(-1)[..., their_class]
            rest = (1 - known.sum(-1, keepdim=True)).clamp(min=0)
            return torch.cat((known, rest), dim=-1)
        case _:
            raise ValueError(
                f"class_scores={teacher_scores} of the teacher and {class_scores} of the student: "
                "probabilities that do not exclude each other teach no softmax; use "
                "model.class_scores=sigmoid"
            )


def as_logits(
    probabilities: Float[Tensor, "*queries classes"], class_scores: ClassScores
) -> Float[Tensor, "*queries classes"]:
    """Logits with these probabilities, for a matching; no surer than float32 can tell from sure."""
    match class_scores:
        case "sigmoid":
            return probabilities.logit(eps=_SMALLEST)
        case "softmax":
            return probabilities.clamp(min=_SMALLEST).log()
        case _:
            assert_never(class_scores)


def entropies(
    probabilities: Float[Tensor, "*queries classes"], class_scores: ClassScores
) -> Float[Tensor, " *queries"]:
    """What a cross-entropy with these probabilities is at the least."""
    own: Tensor = torch.special.entr(probabilities)
    match class_scores:
        case "sigmoid":
            own = own + torch.special.entr(1 - probabilities)
        case "softmax":
            pass
        case _:
            assert_never(class_scores)
    return own.sum(-1)


def cross_entropies(
    logits: Float[Tensor, "*batch students classes"],
    probabilities: Float[Tensor, "*batch teachers classes"],
    class_scores: ClassScores,
) -> Float[Tensor, "*batch students teachers"]:
    """Of each student's logits with each teacher's probabilities, summed over the classes."""
    yes = probabilities.transpose(-1, -2)
    match class_scores:
        case "sigmoid":
            return F.softplus(-logits) @ yes + F.softplus(logits) @ (1 - yes)
        case "softmax":
            return -(logits.log_softmax(-1) @ yes)
        case _:
            assert_never(class_scores)


def divergences(
    logits: Float[Tensor, "*queries classes"],
    probabilities: Float[Tensor, "*queries classes"],
    class_scores: ClassScores,
) -> Float[Tensor, " *queries"]:
    """KL(teacher, student) of each pair, 0 where they agree, summed over the classes."""
    match class_scores:
        case "sigmoid":
            crossed = F.softplus(-logits) * probabilities + F.softplus(logits) * (1 - probabilities)
        case "softmax":
            crossed = -logits.log_softmax(-1) * probabilities
        case _:
            assert_never(class_scores)
    return crossed.sum(-1) - entropies(probabilities, class_scores)
