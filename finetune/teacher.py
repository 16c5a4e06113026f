"""The teacher of a distillation (D3ETR): a trained detector that is only looked at.

It is frozen, in evaluation mode and no part of the student: neither its weights nor its queries get
into a checkpoint. Whether student and teacher go together is found out before anything is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from finetune.artefacts import build_detector, open_weights
from finetune.distill import DistillSettings
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.distillation_losses import Shown, layer_pairs
from models.interop.checkpoint_files import WeightsError
from models.interop.class_names import match_names
from models.matching import ClassScores
from models.query_exchange import exported_queries, refuse_exchange
from models.soft_labels import soft_labels
from models.structures import Classes, Images, QueryGroup, Record
from models.teacher_matching import SoftAnswers


@dataclass(frozen=True)
class Teacher:
    """A detector that shows how it would do it."""

    detector: Detector
    settings: DistillSettings
    their_class: Int64[Tensor, " classes"]
    """The teacher's label of each class of the student."""
    class_scores: ClassScores
    """The student's."""
    layers: tuple[int, ...]
    """For each of the student's decoder layers that of the teacher, counted from 0."""

    @torch.no_grad()
    def show(self, images: Images, record: Record) -> tuple[Shown, QueryGroup]:
        """What it says and sees of a batch, and its queries for the student's decoder."""
        memory = self.detector.encode(images)
        group = self.detector.query_group(memory)
        (found,) = self.detector.decode(memory, (group,), record).groups
        layers = tuple(found.layers[number] for number in self.layers)
        said = torch.stack([layer.logits for layer in layers])
        labels = soft_labels(
            said, self.detector.settings.class_scores, self.class_scores, self.their_class
        )
        boxes = torch.stack([layer.boxes.float() for layer in layers])
        queries = exported_queries(group, self.detector.settings, self.settings.aux_reference)
        return Shown(SoftAnswers(labels, boxes), layers, memory), queries


def open_teacher(settings: DistillSettings, student: DetectorSettings, classes: Classes) -> Teacher:
    """The teacher of the recipe's section `distill`, for a student of these classes; on the CPU.

    Raises:
        WeightsError: what lies at `distill.teacher` is no detector, or does not name its classes.
        ValueError: student and teacher do not go together, in one line that says why.
    """
    artefact = open_weights(settings.teacher)
    if artefact.kind != "detector":
        raise WeightsError(
            f"distill.teacher={artefact.source} is a {artefact.kind}, which cannot be distilled; "
            "give a detector that was trained with task=detect"
        )
    if artefact.classes is None:
        raise WeightsError(
            f"distill.teacher={artefact.source} does not name its classes; export it with "
            "querypatch from the run that trained it"
        )
    teacher = artefact.detector
    labels = their_labels(classes, artefact.classes, settings.classes, artefact.source)
    refuse_pair(settings, teacher, student)
    layers = layer_pairs(student.decoder_layers, teacher.decoder_layers, settings.layer_map)
    detector = build_detector(artefact).requires_grad_(False)
    return Teacher(detector, settings, torch.tensor(labels), student.class_scores, layers)


def their_labels(
    ours: Classes, theirs: Classes, renamed: Mapping[str, str], source: str
) -> list[int]:
    """The teacher's label of each of our classes, by name or as `renamed` says.

    ValueError names those that the teacher does not know.
    """
    unknown = sorted(set(renamed) - set(ours.names))
    if unknown:
        raise ValueError(
            f"distill.classes renames {', '.join(unknown)}, which the data have not; their classes "
            f"are {', '.join(ours.names)}"
        )
    wanted = Classes(tuple(renamed.get(name, name) for name in ours.names), ours.ids)
    found = match_names(wanted, theirs)
    missing = [name for name, label in zip(wanted.names, found, strict=True) if label is None]
    if missing:
        raise ValueError(
            f"distill.teacher={source} does not know {', '.join(missing)}; give its own names for "
            f"them, distill.classes.NAME=ITS_NAME, or a teacher of these classes. Its classes are "
            f"{', '.join(theirs.names)}"
        )
    return [label for label in found if label is not None]


def refuse_pair(
    settings: DistillSettings, teacher: DetectorSettings, student: DetectorSettings
) -> None:
    """Raises ValueError, which says why and what to do, where they do not go together."""
    if (teacher.class_scores, student.class_scores) == ("sigmoid", "softmax"):
        raise ValueError(
            "the teacher says each class by itself (class_scores=sigmoid), the student one of all "
            "(softmax): such probabilities teach no softmax; use model.class_scores=sigmoid"
        )
    if settings.adaptive and teacher.total_queries < student.total_queries:
        raise ValueError(
            f"the teacher has {teacher.total_queries} queries, the student "
            f"{student.total_queries}: adaptive matching needs as many at least; use "
            f"model.num_queries={teacher.total_queries}, or distill.adaptive=false"
        )
    if settings.fixed:
        refuse_exchange(teacher, student)
    if settings.of_cross == 0:
        return
    samples = [each.decoder_attention == "deformable" for each in (teacher, student)]
    if samples[0] != samples[1]:
        raise ValueError(
            f"decoder_attention={teacher.decoder_attention} of the teacher and "
            f"{student.decoder_attention} of the student look at a picture in ways that cannot be "
            "compared; use distill.cross_attention.weight=0"
        )
    if all(samples) and teacher.feature_levels != student.feature_levels:
        raise ValueError(
            f"the teacher looks at {teacher.feature_levels} feature maps, the student at "
            f"{student.feature_levels}, which cannot be compared; use model.feature_levels="
            f"{teacher.feature_levels}, or distill.cross_attention.weight=0"
        )
