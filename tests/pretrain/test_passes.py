"""A batch of patches in several passes teaches what one pass over it teaches."""

import pytest
import torch

from models.structures import Images, PatchBatch, Targets, padding_of
from pretrain.objective import PatchObjective
from pretrain.recipe import PretrainRecipe
from pretrain.weights import blank_model
from tests.pretrain.small_run import DEFORMABLE, RECIPE, SPARSE
from tests.training.gradients import relative_difference, step_gradient
from training.recipe import load_recipe

KINDS = {"dense": (), "deformable": DEFORMABLE, "sparse": SPARSE}
DRAWN = (
    "global_batch=8", "model.dropout=0", "queries.mask_ratio=0.4", "queries.shuffle=true",
    "losses.no_object=paper",
)  # fmt: skip


def five_of_eight() -> PatchBatch:
    """Three pictures of the whole batch are another worker's."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[40, 48], [48, 33], [41, 41], [48, 48], [32, 47]])
    boxes = 0.2 + 0.4 * torch.rand(5, 2, 4, generator=generator)
    pixels = torch.randn(5, 3, 48, 48, generator=generator)
    padding = padding_of(sizes, 48, 48)
    return PatchBatch(
        images=Images(pixels * ~padding[:, None], padding, sizes),
        patches=torch.randn(5, 2, 3, 32, 32, generator=generator),
        targets=Targets(tuple(boxes.unbind()), (torch.ones(2, dtype=torch.int64),) * 5),
        keys=tuple("abcde"),
        sample_ids=torch.arange(5),
        places=(0, 2, 3, 6, 7),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 2])
def test_passes_learn_what_one_pass_learns(kind: str, most: int) -> None:
    told = ["run=r", "data.shards=s", *KINDS[kind], *DRAWN]
    recipe = load_recipe(PretrainRecipe, RECIPE, told)
    objective, batch = PatchObjective(recipe), five_of_eight()
    whole = step_gradient(blank_model(recipe), objective, batch, None)
    parts = step_gradient(blank_model(recipe), objective, batch, most)
    assert relative_difference(parts, whole) < 1e-6
