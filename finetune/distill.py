"""How a run learns from a teacher (D3ETR): the section `distill` of a finetuning recipe."""

from typing import Literal, Self

from pydantic import Field, model_validator

from models.distillation_losses import DistillationWeights
from models.query_exchange import AuxReference
from models.teacher_matching import TeacherCosts


class DistillSettings(DistillationWeights):
    """A teacher, and what is learned from it."""

    teacher: str = Field(min_length=1)
    """A trained detector: a run, an exported folder or a weight file, ours or a public one, by path
    or any fsspec URL.
    """
    adaptive: bool = True
    """Match the student's queries with the teacher's anew in every layer, picture and step."""
    fixed: bool = True
    """Give the teacher's queries to the student's decoder as a second group, with themselves as
    partners; it is not there any more when the student is used.
    """
    match: TeacherCosts = TeacherCosts()
    """What adaptive matching weighs."""
    layer_map: Literal["aligned"] | tuple[tuple[int, int], ...] = "aligned"
    """Which of the teacher's decoder layers each of the student's learns from: at the same share of
    the depth, or pairs [student, teacher], counted from 0.
    """
    aux_weight: float = Field(default=1.0, ge=0)
    """Weight of the ordinary detection loss on the teacher's queries."""
    aux_assignment: Literal["last", "all"] = "last"
    """Where the teacher's matching with the objects stands in for the one that those queries would
    have: in the last layer (the paper), or in all (DETRDistill).
    """
    aux_reference: AuxReference = "student"
    """Conditional DETR: whose points the teacher's queries look around."""
    classes: dict[str, str] = Field(default_factory=dict)
    """The teacher's name of a class of the data, where it is another one and no usual alias."""
    probe_every: int = Field(default=100, ge=1)
    """Updates between two looks at how many partners changed on a few pictures of the start."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.adaptive or self.fixed):
            raise ValueError(
                "adaptive=false and fixed=false learn nothing from the teacher; use one of them, "
                "or leave the section distill out"
            )
        return self
