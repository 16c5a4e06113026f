"""`--continue`: begin a run or go on with it, whichever there is to do."""

from pathlib import Path

import pytest
from rich.console import Console

from cluster.jobs.continuing import begun_or_continued
from cluster.preflight.inputs import RefusedJob, checked_new_run
from cluster.stages import Recipe
from cluster.worker import run_alone
from tests.finetune import small_run as finetuning
from tests.pretrain.small_run import RECIPE, small_shards
from training.recipe import RecipeError

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("continuing"))


def _begin(place: Path, shards: Path, *overrides: str) -> Recipe:
    (place / "own.yaml").write_text(RECIPE)
    told = [f"run={place / 'run'}", f"data.shards={shards}", "loop.steps=3", *overrides]
    return begun_or_continued("pretrain", str(place / "own.yaml"), told)


def test_the_same_command_begins_a_run_and_goes_on_with_it(shards: Path, tmp_path: Path) -> None:
    run_alone(_begin(tmp_path, shards), QUIET)
    with pytest.raises(RefusedJob, match="holds a run already"):
        checked_new_run(_begin(tmp_path, shards))
    assert run_alone(_begin(tmp_path, shards, "resources.workers=2"), QUIET).step == 3
    assert _begin(tmp_path, shards, "resources.workers=2").resources.workers == 2


def test_a_run_of_another_recipe_is_not_gone_on_with(shards: Path, tmp_path: Path) -> None:
    run_alone(_begin(tmp_path, shards), QUIET)
    with pytest.raises(RecipeError, match=r"optimiser\.lr: 0\.001 -> 0\.01$"):
        _begin(tmp_path, shards, "optimiser.lr=0.01")


def test_what_weights_and_data_told_a_finetuning_run_need_not_be_said_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And paths may be said from the folder that the command is given in."""
    finetuning.small_sets(tmp_path / "sets", count=4)
    (tmp_path / "own.yaml").write_text(finetuning.RECIPE)
    monkeypatch.chdir(tmp_path)
    told = [*finetuning.sets_of(Path("sets")), "run=run", "loop.steps=1"]
    first = begun_or_continued("finetune", "own.yaml", told)
    assert first.model.num_classes is not None
    run_alone(first, QUIET)
    assert begun_or_continued("finetune", "own.yaml", told) == first
