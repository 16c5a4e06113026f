"""A teacher's object queries in a student's decoder (D3ETR, fixed matching).

Given to the student beside its own, query n answers for the teacher's query n in every layer:
nothing needs to be matched. The two groups share the decoder and never see each other. Which
queries can be handed over, and whose reference points they have, is our reading.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.structures import DetectorOutput, Images, QueryGroup, Record

TEACHER = "teacher"
"""Name of the group."""

AuxReference = Literal["student", "teacher"]
"""Whose point a handed-over query looks around where points are made of position vectors
(Conditional DETR): the student's, which it learns, or the teacher's.
"""


def exported_queries(
    group: QueryGroup, teacher: DetectorSettings, reference: AuxReference
) -> QueryGroup:
    """The queries with which a teacher reads a memory, for a student; without a gradient."""
    points = group.reference
    if reference == "student" and makes_points(teacher):
        points = None
    return replace(
        group,
        name=TEACHER,
        content=group.content.detach(),
        position=None if group.position is None else group.position.detach(),
        reference=None if points is None else points.detach(),
    )


def makes_points(settings: DetectorSettings) -> bool:
    """Whether the points of queries are made of position vectors that say nothing else."""
    return settings.decoder_attention == "conditional" and settings.query_kind == "position"


def refuse_exchange(teacher: DetectorSettings, student: DetectorSettings) -> None:
    """Raises ValueError, which says why, where the student's decoder cannot take the queries."""
    kinds = [
        {
            "decoder_attention": settings.decoder_attention,
            "query_kind": settings.query_kind,
            "two_stage": settings.two_stage,
        }
        for settings in (teacher, student)
    ]
    theirs, ours = kinds
    for key, value in theirs.items():
        if ours[key] != value:
            raise ValueError(
                f"distill.fixed=true hands the teacher's queries to the student, but {key} is "
                f"{value} there and {ours[key]} here, and such queries mean nothing to it; use "
                "distill.fixed=false"
            )


def needs_projection(teacher: DetectorSettings, student: DetectorSettings) -> bool:
    """Whether handed-over vectors are of another width; anchors without patterns are none."""
    vectors = teacher.query_kind != "anchor" or teacher.num_patterns > 0
    return vectors and teacher.hidden_dim != student.hidden_dim


class AdoptingDetector(nn.Module):
    """A student with a projection for its teacher's wider or narrower queries.

    It is trained with the student and left out of what the student is afterwards: the weights of
    `detector` are those of a plain detector.
    """

    def __init__(self, detector: Detector, teacher_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.detector = detector
        self.query_projection = nn.Linear(teacher_dim, detector.settings.hidden_dim)
        nn.init.xavier_uniform_(self.query_projection.weight, generator=generator)
        nn.init.zeros_(self.query_projection.bias)

    def forward(
        self, images: Images, record: Record = "nothing", adopted: QueryGroup | None = None
    ) -> DetectorOutput:
        """As the detector's; `adopted` has vectors of the teacher's width."""
        if adopted is not None:
            adopted = replace(
                adopted,
                content=self._content(adopted.content),
                position=self._projected(adopted.position),
            )
        found: DetectorOutput = self.detector(images, record, adopted)
        return found

    def _content(self, content: Tensor) -> Tensor:
        """Empty contents stay empty."""
        settings = self.detector.settings
        if settings.decoder_attention != "deformable" and not settings.num_patterns:
            return content.new_zeros((*content.shape[:-1], settings.hidden_dim))
        projected: Tensor = self.query_projection(content)
        return projected

    def _projected(self, position: Tensor | None) -> Tensor | None:
        return None if position is None else self.query_projection(position)
