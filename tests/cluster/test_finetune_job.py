"""Finetuning through Ray: killed with two workers, resumed, and its detector put to use."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import querypatch
from tests.cluster.killing import (
    begin_job,
    finish,
    ids_of,
    kill_when,
    last_step,
    losses_of,
    pixels_of,
    weights_of,
)
from tests.finetune.small_run import RECIPE, lines, sets_of, small_sets

STEPS = 16
TOLD = (
    f"loop.steps={STEPS}", "loop.evaluate_every=8", "loop.score_in_background=true",
    "loop.checkpoint_every_steps=4", "resources.workers=2", "resources.max_restarts=0",
    "data.stream.processes=1", "evaluation.processes=1", "ema={decay: 0.9}",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_finetuning_job_that_is_killed_goes_on_as_if_it_had_not_been_and_is_used(
    tmp_path: Path,
) -> None:
    # 11 pictures are no multiple of the batch of 3, nor is 3 one of the two workers.
    sets = small_sets(tmp_path / "sets", count=11)
    (tmp_path / "own.yaml").write_text(RECIPE)
    begun = ("finetune", tmp_path / "own.yaml", *sets_of(sets), *TOLD)
    finish(begin_job(tmp_path, "whole", *begun, f"run={tmp_path / 'whole'}"))
    job = begin_job(tmp_path, "killed", *begun, f"run={tmp_path / 'killed'}")
    kill_when(job, lambda: last_step(tmp_path, "killed") >= 10)
    finish(begin_job(tmp_path, "killed", "resume", tmp_path / "killed"))

    expected = ids_of(tmp_path, "whole", STEPS)
    assert sorted(expected) == list(range(STEPS))
    assert all(len(ids) == 3 for ids in expected.values())
    assert ids_of(tmp_path, "killed", STEPS) == expected
    assert pixels_of(tmp_path, "killed", STEPS) == pixels_of(tmp_path, "whole", STEPS)
    assert losses_of(tmp_path, "killed") == losses_of(tmp_path, "whole")
    ours, theirs = (weights_of(tmp_path, run, STEPS) for run in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert _judged(tmp_path / "killed") == _judged(tmp_path / "whole")
    _use(tmp_path, sets)


def _judged(run: Path) -> list[dict[str, object]]:
    found = lines(run, "evaluation")
    assert [line["step"] for line in found] == [0, 8, 16]
    return [{name: line[name] for name in line if name.startswith("eval/")} for line in found]


def _use(place: Path, sets: Path) -> None:
    """The command line on the run, and the export of it."""
    run, export = place / "killed", place / "export"
    validation = sets_of(sets)[1].partition("=")[2]
    _call("export", run, export)
    for number, weights in enumerate((run, export)):
        _call("evaluate", weights, validation, "processes=0", "-o", place / f"{number}.json")
    of_run, of_export = (json.loads((place / f"{n}.json").read_text()) for n in (0, 1))
    assert of_run["numbers"] == of_export["numbers"]
    assert of_run["pictures"] == 5
    _call("predict", export, sets / "val", "-o", place / "found", "--threshold", 0)
    assert len(list((place / "found").glob("**/*.jpg"))) == 5


def _call(*arguments: object) -> None:
    done = CliRunner().invoke(querypatch.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
