"""Two workers: a part of the batch without any box, and the same training as one worker."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cluster.worker import run_worker
from finetune.recipe import FinetuneRecipe
from tests.finetune.small_run import (
    QUIET,
    lines,
    run_whole,
    small_recipe,
    unannounced,
    weights,
    write_boxes,
)
from training.progress import open_display
from training.recipe import load_recipe, recipe_yaml
from training.world import World

# Noise of one size, as padding changes what the CNN sees at borders; dropout is drawn per worker.
# With two pictures in the set and in the batch, one worker's part always is without a box.
BOXES = [[(3, 4, 20, 18), (20, 8, 24, 30)], []]
SAME = (
    "data.validation=same", "global_batch=2", "model.dropout=0", "loop.steps=2",
    "loop.evaluate_every=2", "data.augment={kind: none, short_sides: [40], max_size: 64}",
)  # fmt: skip


@pytest.mark.slow
def test_a_worker_without_boxes_neither_hangs_nor_changes_what_is_learned(tmp_path: Path) -> None:
    """Peers' bug 5."""
    train = write_boxes(tmp_path / "set", BOXES, {1: "ant", 2: "bee"}, (40, 56))
    told = (f"data.train={train}", *SAME)
    run_whole(small_recipe(tmp_path, tmp_path / "one", *told))
    _train_in_two(small_recipe(tmp_path, tmp_path / "two", *told, "resources.workers=2"))
    one, two = (lines(tmp_path / run, "train") for run in ("one", "two"))
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        # Terms that are for the log alone are means over workers.
        names = [name for name in theirs if name.startswith("loss/loss_")]
        assert len(names) == 6
        for name in ("loss", "grad_norm", *names):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
        assert ours["pictures"] == theirs["pictures"]
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=3e-3)
    (one_judged, two_judged) = (lines(tmp_path / run, "evaluation") for run in ("one", "two"))
    assert [line["step"] for line in two_judged] == [line["step"] for line in one_judged] == [0, 2]
    assert two_judged[0]["eval/ar100"] == pytest.approx(one_judged[0]["eval/ar100"], abs=1e-6)


def _train_in_two(recipe: FinetuneRecipe) -> None:
    meeting = f"{recipe.run}.meeting"
    torch.multiprocessing.spawn(_work, (recipe_yaml(recipe), meeting), nprocs=2)


def _work(rank: int, recipe_text: str, meeting: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    run_worker(
        load_recipe(FinetuneRecipe, recipe_text),
        World(rank, 2, torch.device("cpu")),
        lambda: False,
        lambda start, total: open_display(QUIET, start, total),
        unannounced,
    )
    torch.distributed.destroy_process_group()
