"""A detector judged on a labelled set: from files to numbers, by one worker and by several."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.evaluation_batches import EvaluationSizes
from finetune.evaluation import (
    Evaluation,
    EvaluationSettings,
    evaluate_detector,
    evaluated_ids,
)
from finetune.evaluation_report import evaluation_json, evaluation_markdown, evaluation_text
from finetune.shares import map_classes
from models.structures import Classes
from tests.finetune.made_pictures import COLOURS, Rectangle, RectangleFinder, made_set
from tests.training.workers import on_workers
from training.world import World

RECTANGLES: tuple[Rectangle, ...] = (
    (10, 5, 40, 30, 0),
    (20, 25, 50, 55, 1),
    (3, 14, 70, 50, 0),
    (30, 12, 60, 48, 2),
    (12, 20, 33, 44, 1),
    (40, 8, 71, 52, 2),
    (5, 30, 45, 58, 0),
)
SETTINGS = EvaluationSettings(
    protocols=("coco", "voc07", "voc"),
    sizes=EvaluationSizes(short_side=96, max_size=160),
    batch_size=2,
    processes=0,
)
ALONE = World.alone(torch.device("cpu"))


def test_what_is_found_in_every_picture_counts_once_and_in_the_picture_s_own_pixels(
    tmp_path: Path,
) -> None:
    """Pictures of different sizes, resized and padded in one batch; boxes come back where they
    are."""
    evaluation = judged(tmp_path, RECTANGLES)
    numbers = evaluation.metrics()
    assert evaluation.pictures == 7
    assert numbers["ap75"] == numbers["ap50"] == pytest.approx(1.0)
    assert numbers["voc07_ap75"] == numbers["voc_ap50"] == pytest.approx(1.0)
    assert numbers["ap"] > 0.85
    assert [each.objects for each in evaluation.voc[0].per_class] == [3, 2, 2]


def test_two_workers_give_the_numbers_of_one(tmp_path: Path) -> None:
    """No picture twice, none left out, though seven pictures do not part evenly."""
    on_workers(judge_and_write, tmp_path)
    alone = evaluation_json(judged(tmp_path, RECTANGLES))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
    assert alone["pictures"] == 7


def judge_and_write(rank: int, folder: Path) -> None:
    data = made_set(folder / f"pictures{rank}", RECTANGLES)
    world = World(rank, 2, torch.device("cpu"))
    score = evaluate_detector(RectangleFinder(), data, COLOURS, SETTINGS, world)
    told = {**evaluation_json(score()), "data": str(folder / "pictures")}
    (folder / f"{rank}.json").write_text(json.dumps(told))


def test_a_worker_without_a_picture_has_its_part_too(tmp_path: Path) -> None:
    data = made_set(tmp_path / "pictures", RECTANGLES[:2])
    world = World(2, 3, torch.device("cpu"))
    evaluation = evaluate_detector(RectangleFinder(), data, COLOURS, SETTINGS, world)()
    assert (evaluation.pictures, evaluation.metrics()) == (0, {"skipped": 0.0})


def test_loader_processes_bring_the_same_pictures(tmp_path: Path) -> None:
    several = SETTINGS.model_copy(update={"processes": 2})
    by_processes = evaluation_json(judged(tmp_path, RECTANGLES, settings=several))
    assert by_processes == evaluation_json(judged(tmp_path, RECTANGLES))


def test_a_picture_that_cannot_be_read_is_left_out_counted_and_named(tmp_path: Path) -> None:
    evaluation = judged(tmp_path, RECTANGLES, broken=[3])
    assert evaluation.pictures == 6
    assert len(evaluation.skipped) == 1
    assert evaluation.skipped[0].startswith("3 in ")
    assert evaluation.metrics()["skipped"] == 1.0
    assert evaluation.metrics()["ap50"] == pytest.approx(1.0)
    assert "1 pictures could not be read and are left out: 3 in" in evaluation_text(evaluation)


def test_classes_meet_by_name_and_not_by_number(tmp_path: Path) -> None:
    """Sparse ids, another order, a class more: the detector's labels are never the data's."""
    model_classes = Classes(("blue", "grey", "red", "green"), (3, 5, 900, 1))
    finder = RectangleFinder(labels=(2, 3, 0), num_classes=4)
    evaluation = judged(tmp_path, RECTANGLES, finder=finder, classes=model_classes)
    assert evaluation.metrics()["ap50"] == pytest.approx(1.0)
    assert (evaluation.missing, evaluation.left_out) == ((), {})


def test_detections_of_a_class_that_the_data_lack_are_left_out_and_counted(tmp_path: Path) -> None:
    """And a class of the data that the detector does not know is not found: it counts as 0."""
    model_classes = Classes(("red", "grey", "blue"), (1, 2, 3))
    evaluation = judged(tmp_path, RECTANGLES, classes=model_classes)
    assert evaluation.left_out == {"grey": 2}
    assert evaluation.missing == ("green",)
    assert evaluation.coco is not None
    assert [each.ap50 for each in evaluation.coco.per_class] == pytest.approx([1.0, 0.0, 1.0])
    assert "does not know green" in evaluation_text(evaluation)


def test_detections_that_are_no_numbers_are_left_out_and_counted(tmp_path: Path) -> None:
    """Of one query in every picture, a diverged one; the other query counts as ever."""

    class Diverged(RectangleFinder):
        def _answer(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            boxes, logits = super()._answer(pixels)
            logits[1] = torch.nan
            return boxes, logits

    evaluation = judged(tmp_path, RECTANGLES, finder=Diverged())
    assert evaluation.not_finite == 7
    assert evaluation.metrics()["ap50"] == pytest.approx(1.0)
    assert "7 detections are not numbers" in evaluation_text(evaluation)


def test_a_detector_of_coco_is_judged_on_voc_by_the_names_that_differ() -> None:
    """As class heads are carried over: six of VOC's classes have another name in COCO."""
    coco = Classes(("tv", "Person", "zebra", "airplane"), (72, 1, 24, 5))
    voc = Classes(("aeroplane", "cow", "person", "tvmonitor"), (1, 10, 15, 20))
    found = map_classes(coco, voc)
    assert found.labels.tolist() == [3, 2, -1, 0]
    assert (found.missing, found.unknown) == (("cow",), ("zebra",))


def test_the_very_name_of_a_class_goes_before_all_that_are_like_it() -> None:
    names = Classes(("Cat", "tv", "cat", "tvmonitor"), (1, 2, 3, 4))
    found = map_classes(names, names)
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert (found.missing, found.unknown) == ((), ())


def test_no_credentials_get_into_tables_and_json(tmp_path: Path) -> None:
    data = made_set(tmp_path, RECTANGLES[:2])
    signed = replace(data, url="https://me:SECRET@host/set.json?sig=SECRET#val")
    evaluation = evaluate_detector(RectangleFinder(), signed, COLOURS, SETTINGS, ALONE)()
    assert evaluation.data == "https://host/set.json#val"
    assert "SECRET" not in evaluation_text(evaluation) + json.dumps(evaluation_json(evaluation))


def test_no_class_in_common_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no class of the detector \(cow\) is one of the data"):
        map_classes(Classes(("cow",), (1,)), COLOURS)


def test_only_the_surest_detections_of_a_picture_count(tmp_path: Path) -> None:
    """The finder's second query is less sure, and of red."""
    one = SETTINGS.model_copy(update={"max_detections": 1, "protocols": ("coco",)})
    evaluation = judged(tmp_path, RECTANGLES, settings=one)
    assert evaluation.metrics()["ar1"] == pytest.approx(evaluation.metrics()["ap"], abs=0.05)
    assert "ar100" not in evaluation.metrics()


def test_fewer_pictures_are_spread_over_the_set() -> None:
    assert evaluated_ids(10, None) == list(range(10))
    assert evaluated_ids(10, 4) == [0, 2, 5, 7]
    assert evaluated_ids(3, 50) == [0, 1, 2]


def test_progress_is_told_after_each_batch(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    data = made_set(tmp_path / "pictures", RECTANGLES, broken=[1])
    evaluate_detector(
        RectangleFinder(),
        data,
        COLOURS,
        SETTINGS,
        ALONE,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_numbers_that_do_not_exist_are_no_metrics_a_dash_and_null(tmp_path: Path) -> None:
    """No object above 96 x 96 pixels; never -1 and never NaN in a journal."""
    evaluation = judged(tmp_path, RECTANGLES)
    assert "ap_large" not in evaluation.metrics()
    assert np.isnan(evaluation.numbers()["ap_large"])
    content = json.loads(json.dumps(evaluation_json(evaluation), allow_nan=False))
    assert content["numbers"]["ap_large"] is None
    assert content["numbers"]["ap50"] == pytest.approx(1.0)
    assert [each["name"] for each in content["classes"]["voc07"]] == list(COLOURS.names)
    lines = evaluation_text(evaluation).splitlines()
    assert [line.split() for line in lines if line.startswith("ap_large")] == [["ap_large", "-"]]


def test_tables_name_every_number_and_every_class(tmp_path: Path) -> None:
    evaluation = judged(tmp_path, RECTANGLES)
    text, page = evaluation_text(evaluation), evaluation_markdown(evaluation)
    for word in ("ap_small", "ar100", "voc07_ap50", "voc_ap", "red", "green", "blue"):
        assert word in text
        assert f"| {word} |" in page
    assert "| class | objects | coco ap | coco ap50 | voc07 ap | voc07 ap50 | voc ap |" in page
    assert "7 pictures of" in text


def test_a_protocol_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="protocols names voc twice"):
        EvaluationSettings(protocols=("voc", "coco", "voc"))
    with pytest.raises(ValueError, match="at least 1"):
        EvaluationSettings(protocols=())


def judged(
    folder: Path,
    rectangles: Sequence[Rectangle],
    broken: Sequence[int] = (),
    finder: RectangleFinder | None = None,
    classes: Classes = COLOURS,
    settings: EvaluationSettings = SETTINGS,
) -> Evaluation:
    data = made_set(folder / "pictures", rectangles, broken)
    return evaluate_detector(finder or RectangleFinder(), data, classes, settings, ALONE)()
