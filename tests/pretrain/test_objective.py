"""The pretraining objective: its public value at the start, and what NaN predictions become."""

import pytest
import torch

from models.patch_queries import PatchDetector
from models.structures import Images, Losses, PatchBatch, Targets, padding_of
from pretrain.objective import PatchObjective
from pretrain.recipe import PretrainRecipe
from pretrain.weights import blank_model
from tests.pretrain.small_run import DEFORMABLE, RECIPE, SPARSE
from tests.training.small import losses_alone
from training.recipe import load_recipe

KINDS: dict[str, tuple[str, ...]] = {"dense": (), "deformable": DEFORMABLE, "sparse": SPARSE}


def recipe_of(*told: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, RECIPE, ["run=r", "data.shards=s", *told])


@pytest.fixture(params=KINDS)
def recipe(request: pytest.FixtureRequest) -> PretrainRecipe:
    return recipe_of(*KINDS[str(request.param)])


def batch(blank: bool = False) -> PatchBatch:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[40, 48], [48, 33]])
    boxes = 0.2 + 0.4 * torch.rand(2, 2, 4, generator=generator)
    return PatchBatch(
        images=Images(
            torch.randn(2, 3, 48, 48, generator=generator), padding_of(sizes, 48, 48), sizes
        ),
        patches=torch.randn(2, 2, 3, 32, 32, generator=generator),
        targets=Targets(tuple(boxes.unbind()), (torch.ones(2, dtype=torch.int64),) * 2),
        keys=("a", "b"),
        sample_ids=torch.tensor([0, 1]),
        blank=blank,
    )


def losses_of(model: PatchDetector, recipe: PretrainRecipe, given: PatchBatch) -> Losses:
    return losses_alone(PatchObjective(recipe), model, given, seed=1)


@pytest.mark.parametrize("blank", [False, True])
def test_every_trained_parameter_gets_a_gradient(recipe: PretrainRecipe, blank: bool) -> None:
    model = blank_model(recipe).train()
    losses_of(model, recipe, batch(blank)).total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_the_total_is_the_weighted_sum_over_layers() -> None:
    recipe = recipe_of()
    losses = losses_of(blank_model(recipe), recipe, batch())
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2, "loss_feature": 1}
    expected = sum(
        weight * losses.terms[name + suffix]
        for name, weight in weights.items()
        for suffix in ("", "_0")
    )
    torch.testing.assert_close(losses.total, expected)


def test_a_sparse_detector_also_learns_which_tokens_its_decoder_reads() -> None:
    recipe = recipe_of(*SPARSE, "losses.selection=3")
    losses = losses_of(blank_model(recipe).train(), recipe, batch())
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2, "loss_feature": 1}
    detection = sum(
        weight * losses.terms[name + suffix]
        for name, weight in weights.items()
        for suffix in ("", "_0")
    )
    expected = detection + 3 * losses.terms["loss_mask_prediction"]
    torch.testing.assert_close(losses.total, expected)
    assert 0 < losses.terms["corr_mask_attn_map_dec_all"] < 1


def test_without_reconstruction_there_is_no_such_term() -> None:
    plain = recipe_of("queries.reconstruction=false")
    assert "loss_feature" not in losses_of(blank_model(plain), plain, batch()).terms


def test_predictions_that_are_not_finite_give_nan_everywhere_and_no_exception(
    recipe: PretrainRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    model = blank_model(recipe).train()
    with torch.no_grad():
        queries = model.detector.queries
        assert queries is not None
        queries.weight.fill_(torch.nan)
    losses = losses_of(model, recipe, batch())
    losses.total.backward()
    assert losses.total.isnan()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert "the step is left out: no finite matching cost" in caplog.text


def test_a_blank_batch_weighs_nothing(recipe: PretrainRecipe) -> None:
    losses = losses_of(blank_model(recipe).train(), recipe, batch(blank=True))
    losses.total.backward()
    assert losses.total == 0
