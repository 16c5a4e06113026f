"""Learning from a teacher (D3ETR): groups, maps, losses, gradients, shares, what comes out.

Numbered tests are those of the method's specification; 6 and 10 are in tests/models.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.artefacts import build_detector, open_weights
from finetune.distill import DistillSettings
from finetune.distillation import DistillationObjective
from finetune.objective import DetectionObjective
from finetune.teacher import Teacher, open_teacher
from models.artefact import Provenance, artefact_metadata
from models.detection_losses import supervision_of
from models.detector import Detector
from models.distillation_losses import layer_pairs
from models.interop.checkpoint_files import WeightsError
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.query_exchange import AdoptingDetector, exported_queries
from models.shares import Share
from models.structures import Classes, DetectionBatch, DetectorOutput, Losses
from tests.finetune.small_detector import CLASSES, INPUT
from tests.models.distillation_small import KINDS, batch_of_two, detector_of, settings_of

KIND_NAMES = tuple(KINDS)
DENSE = ("detr", "conditional", "dab")


def write_detector(path: Path, detector: Detector, classes: Classes = CLASSES) -> str:
    metadata = artefact_metadata("detector", detector.settings, classes, INPUT, Provenance())
    save_file(detector.state_dict(), path, metadata=metadata)
    return str(path)


def teacher_of(
    detector: Detector, student: Detector, settings: Mapping[str, object] | None = None
) -> Teacher:
    """Without a file; the classes are the student's."""
    told = DistillSettings.model_validate({"teacher": "made", **(settings or {})})
    layers = layer_pairs(
        student.settings.decoder_layers, detector.settings.decoder_layers, told.layer_map
    )
    frozen = detector.eval().requires_grad_(False)
    return Teacher(frozen, told, torch.arange(3), student.settings.class_scores, layers)


def objective_of(
    detector: Detector, student: Detector, settings: Mapping[str, object] | None = None
) -> DistillationObjective:
    detection = DetectionObjective(
        MatchingCosts(), LossWeights(), 7, supervision_of(student.settings)
    )
    return DistillationObjective(detection, teacher_of(detector, student, settings), student)


def losses_of(
    objective: DistillationObjective,
    batch: DetectionBatch | None = None,
    model: torch.nn.Module | None = None,
) -> Losses:
    """Of a whole batch on one worker."""
    batch = batch or batch_of_two()
    share = Share(objective.counts(batch))
    return objective(model or objective.student, batch, share, torch.Generator())


def kd_terms(losses: Losses) -> dict[str, float]:
    return {name: float(term) for name, term in losses.terms.items() if name.count("/") == 3}


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_1_recording_changes_no_answer(kind: str) -> None:
    """Parity with the public code itself: `tests.parity`."""
    student, images = detector_of(kind).eval(), batch_of_two().images
    with torch.no_grad():
        plain, recorded = student(images).groups[0], student(images, "all").groups[0]
    for one, other in zip(plain.layers, recorded.layers, strict=True):
        torch.testing.assert_close(one.logits, other.logits)
        torch.testing.assert_close(one.boxes, other.boxes)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_2_groups_do_not_see_each_other(kind: str) -> None:
    student, teacher = detector_of(kind).eval(), detector_of(kind, 1, num_queries=9).eval()
    images = batch_of_two().images
    theirs = teacher.query_group(teacher.encode(images))
    queries = exported_queries(theirs, teacher.settings, "student")
    with torch.no_grad():
        alone, both = student(images, "all"), student(images, "all", queries)
        memory = student.encode(images)
        own = student._adopted(queries)
        aux = student.decode(memory, (own,), "all").groups[0]
    for one, other in ((alone.groups[0], both.groups[0]), (aux, both.groups[1])):
        torch.testing.assert_close(one.layers[-1].logits, other.layers[-1].logits)
        torch.testing.assert_close(one.layers[-1].boxes, other.layers[-1].boxes)
    assert both.groups[1].layers[0].logits.shape[1] == 9


@pytest.mark.parametrize("kind", DENSE)
def test_3_maps_are_per_head_and_before_dropout_and_nothing_is_read_from_padding(kind: str) -> None:
    student = detector_of(kind, dropout=0.5, decoder_layers=1).train()
    images = batch_of_two().images
    with torch.no_grad():
        memory = student.eval().encode(images)
        student.train()
        layer = student.decode(memory, (student.query_group(memory),), "all").groups[0].layers[0]
    assert isinstance(layer.cross_attention, Tensor)
    assert layer.self_attention is not None
    assert layer.cross_attention.shape[1] == layer.self_attention.shape[1] == 2
    for attention in (layer.cross_attention, layer.self_attention):
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    hidden = memory.padding[:, None, None].expand_as(layer.cross_attention)
    assert hidden.any()
    assert (layer.cross_attention[hidden] == 0).all()


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_4_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(kind: str) -> None:
    student, teacher = detector_of(kind).eval(), detector_of(kind)
    teacher.load_state_dict(student.state_dict())
    objective = objective_of(teacher, student, {"aux_reference": "teacher"})
    found = kd_terms(losses_of(objective))
    assert len(found) == 2 * 2 * 5
    assert max(map(abs, found.values())) < 1e-5
    shown, _ = objective.teacher.show(batch_of_two().images, "nothing")
    partners = objective._partners(student(batch_of_two().images).groups[0], shown)
    assert torch.equal(partners, torch.arange(7).expand_as(partners))


def test_5_the_order_of_the_teachers_queries_changes_nothing() -> None:
    student, teacher = detector_of("conditional").eval(), detector_of("conditional", 1)
    other = detector_of("conditional", 1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    assert other.queries is not None
    assert teacher.queries is not None
    with torch.no_grad():
        other.queries.weight.copy_(teacher.queries.weight[order])
    one = losses_of(objective_of(teacher, student))
    two = losses_of(objective_of(other, student))
    torch.testing.assert_close(one.total, two.total)


@pytest.mark.parametrize("where", ["last", "all"])
def test_7_the_teachers_matching_with_the_objects_stands_in_for_that_of_its_queries(
    where: str,
) -> None:
    student, teacher = detector_of("conditional").eval(), detector_of("conditional", 1)
    plain = objective_of(teacher, student, {"aux_assignment": where})
    batch = batch_of_two()
    shown, queries = plain.teacher.show(batch.images, "nothing")
    assigned = plain._assigned(shown, batch.targets)
    assert set(assigned) == ({0, 1} if where == "all" else {1})
    group = student(batch.images, "nothing", queries).groups[1]
    share = Share(plain.counts(batch))
    found = plain._ordinary(group, shown, batch, share)
    pairs = assigned[1]
    targets = torch.stack(
        [
            batch.targets.boxes_cxcywh[p][t]
            for p, t in zip(pairs.picture.tolist(), pairs.target.tolist(), strict=True)
        ]
    )
    said = group.layers[1].boxes[pairs.picture, pairs.query]
    torch.testing.assert_close(found.terms["loss_bbox"], (said - targets).abs().sum() / 4)
    torch.testing.assert_close(
        teacher(batch.images).groups[0].layers[1].boxes, shown.answers.boxes_cxcywh[1]
    )


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_8_every_parameter_of_the_student_learns_and_none_of_the_teacher(kind: str) -> None:
    student, teacher = detector_of(kind).train(), detector_of(kind, 1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective = objective_of(teacher, student)
    losses_of(objective).total.backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())
    assert set(student.state_dict()) == set(detector_of(kind).state_dict())


@pytest.mark.parametrize("kind", ["conditional", "sparse"])
def test_the_losses_of_parts_add_up_to_those_of_the_batch(kind: str) -> None:
    student, teacher = detector_of(kind).eval(), detector_of(kind, 1)
    batch = batch_of_two()
    objective = objective_of(teacher, student)
    whole = losses_of(objective, batch)
    share = Share(objective.counts(batch), workers=2)
    parts = [
        objective(student, batch.part(slice(n, n + 1)), share, torch.Generator()) for n in (0, 1)
    ]
    torch.testing.assert_close((parts[0].total + parts[1].total) / 2, whole.total)
    for name in whole.terms:
        if name.startswith("kd/") and name != "kd/ratio_to_det":
            both = (parts[0].terms[name] + parts[1].terms[name]) / 2
            torch.testing.assert_close(both, whole.terms[name])
    blank = losses_of(objective, replace(batch, blank=True))
    assert float(blank.total.detach()) == 0.0


def test_9_layers_heads_strides_and_classes_may_differ(tmp_path: Path) -> None:
    assert layer_pairs(3, 6, "aligned") == (1, 3, 5)
    assert layer_pairs(6, 3, "aligned") == (0, 0, 1, 1, 1, 2)
    assert layer_pairs(2, 3, ((1, 0), (0, 2))) == (2, 0)
    with pytest.raises(ValueError, match=r"each of the student's decoder layers 0 to 1 once"):
        layer_pairs(2, 3, ((0, 0),))
    with pytest.raises(ValueError, match=r"its layers are 0 to 2"):
        layer_pairs(2, 3, ((0, 0), (1, 3)))
    backbone = KINDS["detr"]["backbone"]
    assert isinstance(backbone, dict)
    fine = {**backbone, "output": "layer3"}
    teacher = detector_of(
        "conditional", 1, decoder_layers=3, num_heads=4, num_queries=9, backbone=fine
    )
    student = detector_of("conditional").train()
    found = losses_of(objective_of(teacher, student))
    assert found.total.isfinite()
    assert "kd/aux/cross/layer1" in found.terms
    place = write_detector(
        tmp_path / "t.safetensors", teacher, Classes(("car", "dog", "cow"), (1, 2, 3))
    )
    told = DistillSettings(teacher=place, classes={"person": "cow"})
    opened = open_teacher(told, student.settings, CLASSES)
    assert opened.their_class.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"does not know person; .* distill\.classes\.NAME"):
        open_teacher(DistillSettings(teacher=place), student.settings, CLASSES)
    with pytest.raises(ValueError, match="renames bus, which the data have not"):
        open_teacher(
            DistillSettings(teacher=place, classes={"bus": "cow"}), student.settings, CLASSES
        )


@pytest.mark.parametrize(
    ("teacher", "student", "told", "complaint"),
    [
        ("conditional", "detr", {}, r"use model\.class_scores=sigmoid"),
        ("dab", "conditional", {}, r"query_kind is anchor there and position here"),
        ("deformable", "conditional", {"fixed": False}, r"distill\.cross_attention\.weight=0"),
        ("sparse", "deformable", {}, "two_stage is True there and False here"),
    ],
)
def test_what_cannot_be_distilled_says_why(
    tmp_path: Path, teacher: str, student: str, told: dict[str, object], complaint: str
) -> None:
    place = write_detector(tmp_path / "t.safetensors", detector_of(teacher))
    settings = DistillSettings.model_validate({"teacher": place, **told})
    with pytest.raises(ValueError, match=complaint):
        open_teacher(settings, settings_of(student), CLASSES)


def test_fewer_queries_and_no_detector_are_refused(tmp_path: Path) -> None:
    place = write_detector(tmp_path / "t.safetensors", detector_of("detr", num_queries=5))
    with pytest.raises(ValueError, match=r"5 queries, the student 7.*distill\.adaptive=false"):
        open_teacher(DistillSettings(teacher=place), settings_of("detr"), CLASSES)
    with pytest.raises(WeightsError, match="holds no weights"):
        open_teacher(DistillSettings(teacher=str(tmp_path)), settings_of("detr"), CLASSES)


def test_a_teacher_of_another_width_is_heard_through_a_projection_that_stays_behind(
    tmp_path: Path,
) -> None:
    student, teacher = (
        detector_of("conditional").train(),
        detector_of("conditional", 1, hidden_dim=48, num_heads=4),
    )
    model = AdoptingDetector(student, 48, torch.Generator().manual_seed(0)).train()
    losses = losses_of(objective_of(teacher, student), model=model)
    losses.total.backward()
    assert model.query_projection.weight.grad is not None
    metadata = artefact_metadata("detector", student.settings, CLASSES, INPUT, Provenance())
    save_file(model.state_dict(), tmp_path / "run.safetensors", metadata=metadata)
    plain = build_detector(open_weights(str(tmp_path / "run.safetensors")))
    images = batch_of_two().images
    found: DetectorOutput = model.eval()(images)
    torch.testing.assert_close(
        plain(images).groups[0].layers[-1].boxes, found.groups[0].layers[-1].boxes
    )


def test_11_a_student_learns_its_teacher_by_heart() -> None:
    student, teacher = detector_of("conditional").train(), detector_of("conditional", 1)
    weights = {"self_attention": {"weight": 5.0}, "cross_attention": {"weight": 20.0}}
    objective = objective_of(teacher, student, weights)
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=3e-3, weight_decay=0)
    first = kd_terms(losses_of(objective))
    batch = batch_of_two()
    share = Share(objective.counts(batch))
    shown, queries = objective.teacher.show(batch.images, "all")
    for step in range(90):
        for group in optimiser.param_groups:
            group["lr"] = 5e-3 * (1 - step / 90)
        optimiser.zero_grad()
        output = student(batch.images, "all", queries)
        main = replace(output, groups=output.groups[:1])
        partners = objective._partners(main.groups[0], shown)
        total = objective._distance("main", main.groups[0], main, shown, partners, batch, share)
        other = objective._distance("aux", output.groups[1], main, shown, None, batch, share)
        (total.total + other.total).backward()
        optimiser.step()
    last = kd_terms(losses_of(objective))
    slow = {name: (first[name], last[name]) for name in first if last[name] > first[name] / 10}
    assert slow == {}


def test_12_distances_are_float32_under_bfloat16_and_finite_at_extreme_logits() -> None:
    student, teacher = detector_of("conditional").train(), detector_of("conditional", 1)
    assert isinstance(teacher.class_head, torch.nn.Linear)
    assert isinstance(student.class_head, torch.nn.Linear)
    with torch.no_grad():
        teacher.class_head.bias.fill_(50.0)
        student.class_head.bias.fill_(-50.0)
    objective = objective_of(teacher, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(objective)
    assert losses.total.dtype == torch.float32
    assert all(term.isfinite() for term in losses.terms.values())
    losses.total.backward()
    grads = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


def test_it_is_told_how_many_partners_changed() -> None:
    student, teacher = detector_of("conditional").train(), detector_of("conditional", 1)
    objective = objective_of(teacher, student, {"probe_every": 2})
    rates = []
    for step in range(5):
        if step == 3:
            assert student.queries is not None
            with torch.no_grad():
                student.queries.weight.normal_(generator=torch.Generator().manual_seed(8))
        rates.append(float(losses_of(objective).terms["kd/match_change_rate"]))
    assert rates[:4] == [1.0, 1.0, 0.0, 0.0]
    assert rates[4] > 0
    assert student.training


def test_without_attention_nothing_is_recorded_and_without_groups_nothing_is_added() -> None:
    student, teacher = detector_of("detr").train(), detector_of("detr", 1)
    off = {"self_attention": {"weight": 0.0}, "cross_attention": {"weight": 0.0}}
    terms = losses_of(objective_of(teacher, student, {**off, "fixed": False})).terms
    named = {name.rpartition("/")[0] for name in terms if name.startswith("kd/main")}
    assert named == {"kd/main/pred_cls", "kd/main/pred_l1", "kd/main/pred_giou"}
    assert not any("aux" in name for name in terms)
    fixed = losses_of(objective_of(teacher, student, {**off, "adaptive": False})).terms
    assert "kd/main/pred_cls/layer0" not in fixed
    assert "aux/loss_ce" in fixed


def test_numbers_that_are_not_finite_leave_the_step_out(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = detector_of("conditional").train(), detector_of("conditional", 1)
    with torch.no_grad():
        for parameter in student.box_head.parameters():
            parameter.fill_(torch.nan)
    losses = losses_of(objective_of(teacher, student))
    assert losses.total.isnan()
    losses.total.backward()
    assert "the step is left out" in caplog.text
