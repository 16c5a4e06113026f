"""The panoptic task: from a finished detector to a mask head that is trained, judged and used."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.detection_batches import (
    TargetForm,
    detection_to_device,
    join_detection,
    pack_detection,
)
from data.detection_content import annotation_of
from data.detection_set import DetectionSet
from data.panoptic_maps import decode_segment_ids
from data.samples import SEGMENTS_PART
from finetune import panoptic_evaluation
from finetune.artefacts import open_weights
from finetune.evaluation import EvaluationSettings
from finetune.panoptic_evaluation import (
    PanopticEvaluation,
    evaluate_panoptic,
    renamed_map,
    true_map,
)
from finetune.panoptic_postprocess import SegmentSettings
from finetune.panoptic_predict import RESULTS, SEGMENTS, predict_panoptic
from finetune.panoptic_quality import PanopticMap, Quality
from finetune.panoptic_task import PanopticObjective, panoptic_task
from finetune.panoptic_weights import build_panoptic, check_dense
from finetune.recipe import FinetuneRecipe
from finetune.task import TaskSets
from models.artefact import PictureInput, Provenance, artefact_metadata
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.mask_head import MaskHeadSettings, PanopticDetector
from models.mask_losses import MaskLossWeights
from models.matching import MatchingCosts
from models.structures import Classes, DetectionBatch, Images, Targets
from tests.data.panoptic_batches import first_batch, sample_of
from tests.data.panoptic_sets import panoptic_set
from tests.models.panoptic_small import SETTINGS, panoptic_detector
from tests.training.small import losses_alone
from training.recipe import load_recipe
from training.world import World

NAMES = ("dog", "cat", "sky", "sea")
ALONE = World.alone(torch.device("cpu"))
INPUT = PictureInput(short_side=64, max_size=106)
KEYS = (
    *("backbone", "hidden_dim", "num_heads", "encoder_layers", "decoder_layers"),
    *("feedforward_dim", "num_queries", "num_classes", "dropout"),
)


@pytest.fixture
def data(tmp_path: Path) -> DetectionSet:
    return panoptic_set(tmp_path / "data", 3)


def test_the_detector_of_init_stays_and_the_mask_head_is_new(
    data: DetectionSet, tmp_path: Path
) -> None:
    init = write_detector(tmp_path / "stage1.safetensors", data.classes)
    task = panoptic_task(recipe_of(data, init), TaskSets(data, None), ALONE, is_fresh=True)
    assert isinstance(task.model, PanopticDetector)
    stage1 = open_weights(init).tensors
    kept = task.model.detector.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in stage1.items())
    assert task.kind == "panoptic"
    assert task.load_report is not None
    assert task.load_report.new
    assert all(name.startswith(("attention.", "mask_head.")) for name in task.load_report.new)
    assert task.backbone is None


def test_a_resumed_run_asks_for_no_init_file(data: DetectionSet, tmp_path: Path) -> None:
    init = write_detector(tmp_path / "stage1.safetensors", data.classes)
    recipe = recipe_of(data, init)
    Path(init).unlink()
    task = panoptic_task(recipe, TaskSets(data, None), ALONE, is_fresh=False)
    assert task.load_report is None
    fresh = panoptic_detector(settings=SETTINGS.model_copy(update={"num_classes": 4}))
    assert task.model.state_dict().keys() == fresh.state_dict().keys()


def test_a_class_that_the_detector_does_not_know_is_an_error(
    data: DetectionSet, tmp_path: Path
) -> None:
    other = Classes(("dog", "cat", "sky", "lake"), (4, 17, 180, 200))
    init = write_detector(tmp_path / "stage1.safetensors", other)
    with pytest.raises(WeightsError, match=r"does not know 1 of the classes, e\.g\. sea"):
        panoptic_task(recipe_of(data, init), TaskSets(data, None), ALONE, is_fresh=True)


def test_data_without_things_and_stuff_are_an_error(data: DetectionSet, tmp_path: Path) -> None:
    init = write_detector(tmp_path / "stage1.safetensors", data.classes)
    boxes = replace(data, classes=replace(data.classes, things=None))
    with pytest.raises(WeightsError, match="kind=coco_panoptic"):
        panoptic_task(recipe_of(data, init), TaskSets(boxes, None), ALONE, is_fresh=True)


def test_a_mask_head_of_another_softmax_is_refused(data: DetectionSet, tmp_path: Path) -> None:
    init = write_panoptic_weights(tmp_path / "stage2.safetensors", data.classes)
    recipe = recipe_of(data, init, "panoptic.head.softmax_over=heads_and_positions")
    with pytest.raises(WeightsError, match=r"panoptic\.head\.softmax_over=positions"):
        panoptic_task(recipe, TaskSets(data, None), ALONE, is_fresh=True)


def test_a_step_lowers_the_loss_and_leaves_the_detector_as_it_was(data: DetectionSet) -> None:
    model = model_of(data).train()
    before = {name: tensor.clone() for name, tensor in model.detector.state_dict().items()}
    batch = first_batch(data, "none")
    objective = PanopticObjective(MatchingCosts(), MaskLossWeights(), 3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    totals = []
    for _ in range(4):
        losses = losses_alone(objective, model, batch)
        optimiser.zero_grad()
        torch.autograd.backward(losses.total)
        optimiser.step()
        totals.append(float(losses.total.detach()))
    assert totals[-1] < totals[0]
    after = model.detector.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_broken_boxes_give_a_loss_that_is_not_finite_and_reaches_every_parameter(
    data: DetectionSet,
) -> None:
    """Peers' bug 5: a worker that cannot match leaves no other waiting."""
    model = model_of(data).train()
    batch = first_batch(data, "none")
    boxes = tuple(box * torch.nan for box in batch.targets.boxes_cxcywh)
    broken = replace(batch, targets=Targets(boxes, batch.targets.labels))
    objective = PanopticObjective(MatchingCosts(), MaskLossWeights(), 3)
    losses = losses_alone(objective, model, broken)
    torch.autograd.backward(losses.total)
    assert not torch.isfinite(losses.total)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)


def test_a_blank_batch_counts_for_nothing(data: DetectionSet) -> None:
    """Peers' bug 5."""
    model = model_of(data).train()
    objective = PanopticObjective(MatchingCosts(), MaskLossWeights(), 3)
    losses = losses_alone(objective, model, blank_batch())
    torch.autograd.backward(losses.total)
    assert float(losses.total.detach()) == 0


def test_true_masks_as_predictions_are_judged_perfect(
    data: DetectionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluated_as_true(data, data.classes, monkeypatch)
    assert evaluation.quality.all == Quality(1.0, 1.0, 1.0)
    assert evaluation.quality.pictures == 3
    assert evaluation.metrics()["pq_stuff"] == 1.0
    assert json.loads(json.dumps(evaluation.content()))["classes"]["sea"]["pq"] == 1.0
    assert "things" in evaluation.text()


def test_classes_meet_by_name_and_those_of_the_model_alone_become_void(
    data: DetectionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Classes(("sea", "lake", "cat"), (1, 2, 3), (False, False, True))
    evaluation = evaluated_as_true(data, known, monkeypatch)
    assert set(evaluation.missing) == {"dog", "sky"}
    # The sky of each picture is taken for a lake, which the data do not have.
    assert evaluation.left_out == {"lake": 3}
    assert evaluation.quality.by_class["sea"] == Quality(1.0, 1.0, 1.0)
    assert evaluation.quality.by_class["sky"] == Quality(0.0, 0.0, 0.0)


def test_a_picture_whose_png_is_damaged_is_named_and_left_out(
    data: DetectionSet, tmp_path: Path
) -> None:
    (tmp_path / "data" / "panoptic_train2017" / "000000000001.png").write_bytes(b"no picture")
    evaluation = evaluate_panoptic(
        model_of(data).eval(), data, data.classes, judging(), SegmentSettings(), ALONE
    )()
    assert evaluation.quality.pictures == 2
    (told,) = evaluation.skipped
    assert told.startswith("000000000001: ")


def test_weights_come_back_as_they_were_written_with_their_softmax(
    data: DetectionSet, tmp_path: Path
) -> None:
    source = write_panoptic_weights(
        tmp_path / "stage2.safetensors", data.classes, MaskHeadSettings(softmax_over="positions")
    )
    artefact = open_weights(source)
    model = build_panoptic(artefact)
    assert artefact.classes == data.classes
    assert model.settings.softmax_over == "positions"
    assert not model.training
    written = model_of(data).state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


def test_a_detector_without_a_mask_head_segments_nothing(
    data: DetectionSet, tmp_path: Path
) -> None:
    source = write_detector(tmp_path / "stage1.safetensors", data.classes)
    with pytest.raises(WeightsError, match="task=panoptic"):
        build_panoptic(open_weights(source))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"decoder_attention": "deformable"}, "reads dense attention"),
        ({"class_scores": "sigmoid"}, "with softmax scores alone"),
    ],
)
def test_what_a_mask_head_cannot_go_on_is_refused_before_the_run(
    told: dict[str, object], said: str
) -> None:
    settings = SETTINGS.model_copy(update=told)
    with pytest.raises(WeightsError, match=f"task=panoptic: .*{said}.*give init= a DETR detector"):
        check_dense(settings)


def test_prediction_writes_drawings_pngs_and_cocos_json(data: DetectionSet, tmp_path: Path) -> None:
    """Peers' bug 8: the category ids are those of the data."""
    source = write_panoptic_weights(tmp_path / "stage2.safetensors", data.classes)
    pictures = tmp_path / "data" / "train2017"
    (pictures / "000000000007.jpg").write_bytes(b"broken")
    report = predict_panoptic(
        source,
        [str(pictures)],
        tmp_path / "out",
        settings=SegmentSettings(threshold=0.0, max_small_area=0),
        device="cpu",
    )
    assert report.num_pictures == 3
    assert [Path(one.url).name for one in report.left_out] == ["000000000007.jpg"]
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert [entry["image_id"] for entry in results["annotations"]] == [0, 1, 2]
    assert [category["id"] for category in results["categories"]] == [4, 17, 180, 200]
    for entry in results["annotations"]:
        ids = decode_segment_ids((tmp_path / "out" / SEGMENTS / entry["file_name"]).read_bytes())
        assert ids.shape == (48, 64)
        found, areas = np.unique(ids[ids > 0], return_counts=True)
        assert [info["id"] for info in entry["segments_info"]] == found.tolist()
        assert [info["area"] for info in entry["segments_info"]] == areas.tolist()
        assert {info["category_id"] for info in entry["segments_info"]} <= {4, 17, 180, 200}
        assert (tmp_path / "out" / entry["drawn"]).is_file()


def write_detector(path: Path, classes: Classes) -> str:
    settings = small_settings(classes)
    detector = Detector(settings, torch.Generator().manual_seed(1))
    metadata = artefact_metadata("detector", settings, classes, INPUT, Provenance())
    save_file(detector.state_dict(), path, metadata=metadata)
    return str(path)


def write_panoptic_weights(
    path: Path, classes: Classes, head: MaskHeadSettings | None = None
) -> str:
    settings = small_settings(classes)
    metadata = artefact_metadata(
        "panoptic", settings, classes, INPUT, Provenance(), head or MaskHeadSettings()
    )
    save_file(panoptic_detector(settings=settings).state_dict(), path, metadata=metadata)
    return str(path)


def small_settings(classes: Classes) -> DetectorSettings:
    return SETTINGS.model_copy(update={"num_classes": len(classes.names)})


def model_of(data: DetectionSet) -> PanopticDetector:
    return panoptic_detector(settings=small_settings(data.classes))


def recipe_of(data: DetectionSet, init: str, *overrides: str) -> FinetuneRecipe:
    settings = small_settings(data.classes).model_dump(mode="json", include=set(KEYS))
    settings["backbone"]["weights"] = None
    values = {
        "run": "nowhere",
        "init": init,
        "task": "panoptic",
        "global_batch": 3,
        "model": settings,
        "data": {"train": data.url, "kind": "coco_panoptic"},
        "loop": {"steps": 2},
        "schedule": {"kind": "step", "unit": "steps", "drop_at": [2]},
        "best_metric": "eval/pq",
    }
    return load_recipe(FinetuneRecipe, values, list(overrides))


def judging(short_side: int = 64) -> EvaluationSettings:
    sizes = {"short_side": short_side, "max_size": 2 * short_side}
    return EvaluationSettings.model_validate({"sizes": sizes, "batch_size": 2, "processes": 0})


def evaluated_as_true(
    data: DetectionSet, classes: Classes, monkeypatch: pytest.MonkeyPatch
) -> PanopticEvaluation:
    """A model that finds what is there, in its own classes; skies it takes for lakes."""
    names = ["lake" if name == "sky" and "lake" in classes.names else name for name in NAMES]
    labels = [classes.names.index(name) if name in classes.names else -1 for name in names]
    truths = iter([renamed_map(truth, labels) for truth in map(partial(truth_of, data), range(3))])

    def found(_: object, images: Images, *__: object) -> list[PanopticMap]:
        # Pictures of one shape come in the order of the set.
        return [next(truths) for _ in images.sizes]

    monkeypatch.setattr(panoptic_evaluation, "panoptic_maps", found)
    return evaluate_panoptic(model_of(data), data, classes, judging(), SegmentSettings(), ALONE)()


def truth_of(data: DetectionSet, id: int) -> PanopticMap:
    """Crowds are found as what they are groups of."""
    sample = sample_of(data, id)
    truth = true_map(annotation_of(sample), sample.parts[SEGMENTS_PART], data.classes)
    return replace(truth, crowd=np.zeros_like(truth.crowd))


def blank_batch() -> DetectionBatch:
    """As of a worker all of whose pictures were broken."""
    packed = pack_detection((), (), 0, {}, TargetForm(has_segments=True))
    return detection_to_device(join_detection([packed]), torch.device("cpu"))
