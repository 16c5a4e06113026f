"""Whole runs of Deformable and Sparse DETR in this process: trained, cut, resumed, judged, used."""

from pathlib import Path

import pytest
import torch

from finetune.artefacts import open_weights
from finetune.evaluate_weights import judge_weights
from finetune.predict import load_detector
from tests.finetune.small_family import DEFORMABLE, SPARSE, TWO_STAGE
from tests.finetune.small_run import (
    lines,
    losses,
    run_until,
    run_whole,
    sets_of,
    small_recipe,
    small_sets,
    weights,
)
from training.recipe import RecipeError

CPU = torch.device("cpu")
JUDGED = ["processes=0", "batch_size=4"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sets(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def sparse(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of Sparse DETR, judged on the way."""
    run = tmp_path_factory.mktemp("sparse") / "run"
    run_whole(small_recipe(sets, run, *SPARSE, "loop.evaluate_every=3"))
    return run


@pytest.mark.parametrize(
    "told", [DEFORMABLE, TWO_STAGE, SPARSE], ids=["learned queries", "two-stage", "sparse"]
)
def test_a_deformable_run_trains_every_part_and_is_used(
    told: tuple[str, ...], sets: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_until(small_recipe(sets, run, *told), 1)
    first = weights(run)
    run_whole(small_recipe(sets, run, *told))
    last = weights(run)
    still = [name for name in last if torch.equal(last[name], first[name])]
    assert {name.partition(".")[0] for name in still} == {"backbone"}
    rates = {name: value for name, value in lines(run, "train")[-1].items() if "lr" in name}
    assert sorted(rates.values()) == [1e-4, 1e-3]
    found = load_detector(str(run), "cpu").predict(
        str(next((sets / "val").glob("*.jpg"))), threshold=0.0
    )
    assert len(found[0].scores) > 0


def test_a_sparse_run_that_was_cut_goes_on_bit_by_bit(
    sets: Path, sparse: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(sets, tmp_path / "cut", *SPARSE, "loop.evaluate_every=3")
    assert run_until(recipe, 3).step == 3
    run_whole(recipe)
    assert losses(tmp_path / "cut") == losses(sparse)
    ours, theirs = weights(tmp_path / "cut"), weights(sparse)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_model_is_judged_at_any_share_of_its_tokens(sets: Path, sparse: Path) -> None:
    """Dynamic sparsification (Sparse DETR, section 4.3)."""
    validation = sets_of(sets)[1].partition("=")[2]
    corr = {}
    for rho in (0.1, 0.4, 1.0):
        judged = judge_weights(str(sparse), validation, [*JUDGED, f"model.rho={rho}"], CPU)
        selection = judged.content["selection"]
        assert isinstance(selection, dict)
        corr[rho] = selection["corr_mask_attn_map_dec_all"]
        assert "Corr" in judged.text
    assert corr[0.1] < corr[0.4] < corr[1.0] == pytest.approx(1.0)
    own = judge_weights(str(sparse), validation, JUDGED, CPU)
    again = judge_weights(str(sparse), validation, [*JUDGED, "model.rho=0.4"], CPU)
    assert own.content == again.content
    told = open_weights(str(sparse)).provenance.metrics
    assert told["eval/corr_mask_attn_map_dec_all"] == pytest.approx(corr[0.4], abs=1e-5)


def test_only_what_needs_no_other_weights_may_be_said_anew(
    sets: Path, sparse: Path, tmp_path: Path
) -> None:
    validation = sets_of(sets)[1].partition("=")[2]
    for told, message in (
        ("model.num_queries=9", r"model\.num_queries: these weights were trained with a value of"),
        ("model.rho=null", r"use model\.rho=1 to update all tokens"),
        ("model.rho=1.5", r"rho=1\.5: should be less than or equal to 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            judge_weights(str(sparse), validation, [*JUDGED, told], CPU)
    run_until(small_recipe(sets, tmp_path / "plain", *TWO_STAGE), 2)
    with pytest.raises(RecipeError, match=r"model\.rho: .* has no token selection"):
        judge_weights(str(tmp_path / "plain"), validation, [*JUDGED, "model.rho=0.1"], CPU)


def test_weights_of_one_run_begin_another_of_the_family(sets: Path, tmp_path: Path) -> None:
    plain, sparse = tmp_path / "plain", tmp_path / "sparse"
    run_until(small_recipe(sets, plain, *DEFORMABLE), 2)
    told = (*SPARSE, f"init={plain}", "from_scratch=false", "loop.steps=2")
    run_whole(small_recipe(sets, sparse, *told))
    found = open_weights(str(sparse))
    assert (found.detector.rho, found.detector.two_stage) == (0.4, True)
    assert str(plain) in found.provenance.init[0]


def test_a_sparse_detector_learns_two_pictures(tmp_path: Path) -> None:
    """Every loss that it has falls: of the decoder, of tokens, of the scoring network."""
    sets, run = small_sets(tmp_path, count=2), tmp_path / "run"
    told = (
        *SPARSE, "global_batch=2", "data.augment={kind: none, short_sides: [40], max_size: 64}",
        "loop.steps=25", "loop.checkpoint_every_steps=25", "optimiser.lr=2e-3", "model.dropout=0",
    )  # fmt: skip
    run_whole(small_recipe(sets, run, *told))
    first, last = (lines(run, "train")[step] for step in (0, -1))
    terms = [name for name in first if name.startswith("loss/loss_ce")]
    assert {"loss/loss_ce", "loss/loss_ce_0", "loss/loss_ce_enc", "loss/loss_ce_enc_0"} <= {*terms}
    assert last["loss"] < 0.9 * first["loss"]
    for name in (*terms, "loss/loss_mask_prediction"):
        assert last[name] < first[name]
