"""Learning from a teacher beside the objects (D3ETR, Chen et al., IJCAI 2024, section 4).

The student's own queries have the ordinary loss, and partners among the teacher's queries that are
found anew in every layer (adaptive matching). The teacher's queries go through the student's
decoder too, with the ordinary loss and themselves as partners (fixed matching). A step costs the
teacher's forward pass and a longer decoder more; the student is then what it is without all this.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from data.detection_batches import PackedDetectionBatch
from finetune.distill import DistillSettings
from finetune.objective import DetectionObjective
from finetune.task import Task
from finetune.teacher import Teacher
from models.detection_losses import detection_losses, unmatched_losses
from models.detector import Detector
from models.distillation_losses import Distilled, DistilledGroup, Shown, distillation_losses
from models.losses import set_losses
from models.matching import Matching, UnmatchableError, match
from models.query_exchange import AdoptingDetector, needs_projection
from models.shares import Share
from models.soft_labels import as_logits
from models.structures import (
    DetectionBatch,
    DetectorOutput,
    GroupOutput,
    Images,
    Losses,
    Record,
    Targets,
)
from models.teacher_matching import match_teacher
from training.world import World

logger = logging.getLogger(__name__)

PROBED = 4
"""Pictures on which it is looked how many partners change."""


def distilled_task(
    task: Task[PackedDetectionBatch],
    objective: DetectionObjective,
    teacher: Teacher,
    seed: int,
    world: World,
) -> Task[PackedDetectionBatch]:
    """The detection task `task`, whose detector learns from the teacher as well."""
    detector = task.model
    assert isinstance(detector, Detector)
    teacher = replace(
        teacher,
        detector=teacher.detector.to(world.device),
        their_class=teacher.their_class.to(world.device),
    )
    theirs = teacher.detector.settings
    model: nn.Module = detector
    if teacher.settings.fixed and needs_projection(theirs, detector.settings):
        generator = torch.Generator().manual_seed(seed)
        model = AdoptingDetector(detector, theirs.hidden_dim, generator)
    learned = DistillationObjective(objective, teacher, detector)
    return replace(task, model=model, objective=learned)


@dataclass
class Probe:
    """A few pictures of the start, and the partners that their queries had at the last look."""

    passes: int = 0
    images: Images | None = None
    shown: Shown | None = None
    partners: Int64[Tensor, "layers batch queries"] | None = None
    changed: float | Float[Tensor, ""] = 1.0
    """Share of the queries with another partner than at the look before; 1 before there was one."""


@dataclass(frozen=True)
class DistillationObjective:
    """The losses of a batch with a teacher; `student` is what the loop's model computes with."""

    detection: DetectionObjective
    teacher: Teacher
    student: Detector
    probe: Probe = field(default_factory=Probe)

    @property
    def settings(self) -> DistillSettings:
        """What is learned from the teacher."""
        return self.teacher.settings

    def counts(self, batch: DetectionBatch) -> Float[Tensor, "3"]:
        """Those of detection."""
        return self.detection.counts(batch)

    def __call__(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        share: Share,
        generator: torch.Generator,  # noqa: ARG002  (nothing is drawn)
    ) -> Losses:
        """The losses of one part; predictions that are not finite give a total of NaN."""
        record: Record = "all" if self.settings.records else "nothing"
        shown, queries = self.teacher.show(batch.images, record)
        output: DetectorOutput = model(
            batch.images, record, queries if self.settings.fixed else None
        )
        main = replace(output, groups=output.groups[:1])
        try:
            return self._losses(main, output.groups[1:], shown, batch, share)
        except UnmatchableError as error:
            logger.warning("the step is left out: %s", error)
            last = [group.layers[-1] for group in output.groups[1:]]
            others = [tensor for layer in last for tensor in (layer.logits, layer.boxes)]
            supervision = self.detection.supervision
            return unmatched_losses(main, batch.targets, supervision, others=others)

    def _losses(
        self,
        main: DetectorOutput,
        others: tuple[GroupOutput, ...],
        shown: Shown,
        batch: DetectionBatch,
        share: Share,
    ) -> Losses:
        detection = self.detection
        found = detection_losses(
            main,
            batch.targets,
            detection.weights,
            detection.costs,
            detection.supervision,
            share=share,
            blank=batch.blank,
        )
        terms = dict(found.terms)
        taught: list[Tensor] = []
        if self.settings.adaptive:
            partners = self._partners(main.groups[0], shown)
            learned = self._distance("main", main.groups[0], main, shown, partners, batch, share)
            taught.append(learned.total)
            terms |= learned.terms
            here = share.of_pictures(share.pictures.new_tensor(float(_heard(batch))))
            terms["kd/match_change_rate"] = here * self._changed(batch)
        aux = found.total.new_zeros(())
        for group in others:
            ordinary = self._ordinary(group, shown, batch, share)
            aux = self.settings.aux_weight * ordinary.total
            terms |= {f"aux/{name}": term for name, term in ordinary.terms.items()}
            learned = self._distance("aux", group, main, shown, None, batch, share)
            taught.append(learned.total)
            terms |= learned.terms
        from_teacher = torch.stack(taught).sum()
        terms["kd/ratio_to_det"] = _ratio(from_teacher, found.total, batch, share)
        return Losses(found.total + aux + from_teacher, terms)

    def _partners(self, group: GroupOutput, shown: Shown) -> Int64[Tensor, "layers batch queries"]:
        return match_teacher(
            torch.stack([layer.logits for layer in group.layers]),
            torch.stack([layer.boxes for layer in group.layers]),
            shown.answers,
            self.settings.match,
            self.teacher.class_scores,
        )

    def _distance(
        self,
        name: DistilledGroup,
        group: GroupOutput,
        main: DetectorOutput,
        shown: Shown,
        partners: Int64[Tensor, "layers batch queries"] | None,
        batch: DetectionBatch,
        share: Share,
    ) -> Distilled:
        return distillation_losses(
            name,
            group,
            main.memory,
            shown,
            partners,
            self.settings,
            self.teacher.class_scores,
            share,
            blank=batch.blank,
        )

    def _ordinary(
        self, group: GroupOutput, shown: Shown, batch: DetectionBatch, share: Share
    ) -> Losses:
        """The detection loss of the teacher's queries, with its matching where that is asked."""
        detection = self.detection
        return set_losses(
            group,
            batch.targets,
            detection.weights,
            detection.costs,
            class_scores=self.teacher.class_scores,
            share=share,
            blank=batch.blank,
            assigned=self._assigned(shown, batch.targets),
        )

    def _assigned(self, shown: Shown, targets: Targets) -> Mapping[int, Matching]:
        """The teacher's own matching with the objects, by the student's layer."""
        last = len(shown.layers) - 1
        numbers = range(last + 1) if self.settings.aux_assignment == "all" else (last,)
        answers, scores = shown.answers, self.teacher.class_scores
        return {
            number: match(
                as_logits(answers.probabilities[number, None], scores),
                answers.boxes_cxcywh[number, None],
                targets,
                self.detection.costs,
                scores,
            )
            for number in numbers
        }

    @torch.no_grad()
    def _changed(self, batch: DetectionBatch) -> float | Float[Tensor, ""]:
        """How many partners changed between the last two looks at the pictures of the start."""
        probe = self.probe
        if batch.blank:
            return probe.changed
        if probe.images is None:
            probe.images = batch.images.part(slice(0, PROBED))
            probe.shown, _ = self.teacher.show(probe.images, "nothing")
        if probe.passes % self.settings.probe_every == 0:
            assert probe.shown is not None
            self.student.eval()
            (group,) = self.student(probe.images).groups
            self.student.train()
            partners = self._partners(group, probe.shown)
            if probe.partners is not None:
                probe.changed = (partners != probe.partners).float().mean()
            probe.partners = partners
        probe.passes += 1
        return probe.changed


def _heard(batch: DetectionBatch) -> int:
    return 0 if batch.blank else len(batch.targets.labels)


def _ratio(
    from_teacher: Tensor, detection: Tensor, batch: DetectionBatch, share: Share
) -> Float[Tensor, ""]:
    """What comes from the teacher over the student's detection loss, mean over the pictures."""
    smallest = torch.finfo(detection.dtype).tiny
    ratio = from_teacher.detach() / detection.detach().clamp(min=smallest)
    return share.of_pictures(_heard(batch) * ratio)
