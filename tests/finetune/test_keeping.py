"""What stays of a run's evaluations: the best weights, tables, the end of patience."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from finetune.keeping import Keeper, history_of
from finetune.task import Judgement
from training.early_stop import EarlyStopSettings
from training.job import Evaluated
from training.metrics import Journal
from training.run_folder import Patience, RunFolder, open_run_folder
from training.uploads import Uploads


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(str(tmp_path / "run"))


def judged(keeper: Keeper, step: int, ap: float) -> bool:
    keeper.hear(Judgement({"ap": ap}, {"classes": {"cat": ap}}))
    weights = {"head": torch.tensor([float(step)])}
    return keeper.judge(Evaluated(step, {"eval/ap": ap}, weights))


def keeper_of(
    folder: RunFolder, uploads: Uploads, early_stop: EarlyStopSettings | None = None
) -> Keeper:
    return Keeper(
        folder, uploads, "eval/ap", early_stop, lambda evaluated: {"step": str(evaluated.step)}
    )


def best(folder: RunFolder) -> tuple[str, float]:
    """Step in the header and the one weight of the best file."""
    with safe_open(f"{folder.root}/best/model.safetensors", "pt") as file:
        return file.metadata()["step"], file.get_tensor("head").item()


def test_the_best_weights_are_those_of_the_highest_metric(folder: RunFolder) -> None:
    uploads = Uploads()
    keeper = keeper_of(folder, uploads)
    for step, ap in ((2, 0.3), (4, 0.5), (6, 0.4)):
        assert not judged(keeper, step, ap)
    uploads.close()
    assert best(folder) == ("4", 4.0)


def test_the_sanity_evaluation_is_never_the_best(folder: RunFolder) -> None:
    """Peers' bug 3."""
    uploads = Uploads()
    keeper = keeper_of(folder, uploads)
    judged(keeper, 0, 0.9)
    uploads.flush()
    assert folder.size("best/model.safetensors") is None
    judged(keeper, 2, 0.1)
    uploads.close()
    assert best(folder) == ("2", 2.0)


def test_weights_that_could_not_be_stored_make_room_for_the_next_best(tmp_path: Path) -> None:
    """Else `best/` would hold, to the end, what was the best before the store was away."""
    folder = open_run_folder(str(tmp_path), patience=Patience(attempts=1))
    uploads = Uploads()
    keeper = keeper_of(folder, uploads)
    judged(keeper, 2, 0.3)
    uploads.flush()
    (tmp_path / "best").rename(tmp_path / "away")
    (tmp_path / "best").touch()
    judged(keeper, 4, 0.6)
    uploads.flush()
    assert uploads.failures == 1
    (tmp_path / "best").unlink()
    (tmp_path / "away").rename(tmp_path / "best")
    for step, ap in ((6, 0.2), (8, 0.5), (10, 0.4)):
        judged(keeper, step, ap)
    uploads.close()
    assert best(folder) == ("8", 8.0)


def test_every_evaluation_leaves_its_table(folder: RunFolder) -> None:
    uploads = Uploads()
    judged(keeper_of(folder, uploads), 12, 0.25)
    uploads.close()
    table = json.loads(folder.read("evaluations/step_000012.json"))
    assert table == {"step": 12, "classes": {"cat": 0.25}}


def test_patience_ends_the_run_and_the_record_says_so_to_a_later_start(folder: RunFolder) -> None:
    uploads = Uploads()
    journal = Journal(folder, uploads, 0, time.monotonic)
    keeper = keeper_of(folder, uploads, EarlyStopSettings(patience=2))
    answers = []
    for step, ap in ((0, 0.9), (2, 0.3), (4, 0.3), (6, 0.2)):
        journal.write_evaluation(step, {"eval/ap": ap})
        answers.append(judged(keeper, step, ap))
    journal.close()
    uploads.close()
    assert answers == [False, False, False, True]
    assert history_of(folder, "eval/ap") == [(0, 0.9), (2, 0.3), (4, 0.3), (6, 0.2)]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(folder: RunFolder) -> None:
    uploads = Uploads()
    journal = Journal(folder, uploads, 0, time.monotonic)
    for step, ap in ((2, 0.3), (4, 0.8)):
        journal.write_evaluation(step, {"eval/ap": ap})
    journal.close()
    keeper = keeper_of(folder, uploads)
    judged(keeper, 4, 0.4)  # the same step again, with other workers: another last bit
    judged(keeper, 6, 0.5)
    uploads.close()
    assert best(folder) == ("6", 6.0)
