"""The whole of finetuning on genuine photographs: it can learn a handful of them by heart."""

from pathlib import Path
from typing import get_args

import pytest

from benchmarks.overfit import Family, overfit_recipe
from finetune.keeping import history_of
from tests.finetune.small_run import run_whole
from training.run_folder import open_run_folder


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", get_args(Family))
def test_sixteen_pictures_of_voc_are_learned_to_an_ap50_over_nine_tenths(
    family: Family, shared_data: Path, tmp_path: Path
) -> None:
    recipe = overfit_recipe(
        f"{shared_data / 'VOCdevkit/VOC2012'}#train",
        str(shared_data / "weights/resnet50_in1k_conv1-layer3_fp16.pth"),
        tmp_path / "run",
        num_pictures=16,
        choice=16,  # 24 objects, none of them small: they can be told apart at a stride of 16
        steps=360 if family in ("conditional", "dab") else 240,
        side=128,
        family=family,
    )
    run_whole(recipe)
    (first, untrained), *_, (last, learned) = history_of(open_run_folder(recipe.run), "eval/ap50")
    assert (first, last) == (0, 240)
    assert untrained < 0.1
    assert learned > 0.9
