"""Any number of workers, in any number of passes, learns the same but for rounding."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.index import write_index
from pretrain.run import pretrain
from tests.data.tars import write_shards
from tests.pretrain.small_run import small_recipe
from tests.training.gradients import BETA, relative_difference
from tests.training.workers import on_workers
from training.metrics import StepRecord
from training.run_folder import open_run_folder
from training.snapshot import Position, TrainingState
from training.stage import Host
from training.uploads import Uploads
from training.world import World

TOLD = (
    "global_batch=4", "loop.steps=3", "loop.pad_to=batch", "model.dropout=0",
    "queries.mask_ratio=0.3", "queries.shuffle=true", "optimiser.clip_norm=null",
    "loop.checkpoint_every_steps=1", "optimiser.lr=1e-4",
)  # fmt: skip
CASES = {
    "one": (1, ()),
    "two": (2, ()),
    "three in passes": (3, ("resources.max_pictures_per_pass=1",)),
}


@dataclass(frozen=True)
class Learned:
    """What the first worker knew after each step."""

    path: Path

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        """Keeps the optimiser's mean of the gradients."""
        names = {parameter: name for name, parameter in state.model.named_parameters()}
        moments = {
            names[parameter]: values["exp_avg"].clone()
            for parameter, values in state.optimiser.state.items()
        }
        weights = state.model.state_dict()
        torch.save({"weights": weights, "moments": moments}, self.path / f"{position.step}.pt")

    def flush(self) -> None:
        """Everything is written at once."""


class Told:
    """A display that keeps the records."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def show(self, record: StepRecord) -> None:
        self.records.append(record)

    def advance(self, step: int) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Not shown."""


class Nowhere:
    """The other workers write nothing."""

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""


def run(rank: int, folder: Path, size: int, told: tuple[str, ...]) -> None:
    recipe = small_recipe(folder.parent / "shards", folder / "run", *TOLD, *told)
    display = Told()
    host = Host(
        world=World(rank, size, torch.device("cpu")),
        folder=open_run_folder(recipe.run),
        uploads=Uploads(),
        checkpoints=Learned(folder) if rank == 0 else Nowhere(),
        stop=lambda: False,
        display=lambda start, total: nullcontext(display),
    )
    pretrain(recipe, host)
    host.uploads.close()
    if rank == 0:
        rows = [(dict(r.losses), r.grad_norm, r.pictures, r.skipped) for r in display.records]
        torch.save(rows, folder / "records.pt")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case."""
    place = tmp_path_factory.mktemp("workers")
    write_index(write_shards(place / "shards", (6, 5), broken=(4,)))
    for name, (size, told) in CASES.items():
        (place / name).mkdir()
        on_workers(partial(run, size=size, told=told), place / name, size)
    return place


def after_first_step(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, and the gradient of the step."""
    kept = torch.load(folder / "1.pt")
    return kept["weights"], {name: m / (1 - BETA) for name, m in kept["moments"].items()}


@pytest.mark.parametrize("case", [name for name in CASES if name != "one"])
def test_any_number_of_workers_learns_what_one_learns(learned: Path, case: str) -> None:
    """Pictures of several sizes, masked patches, shuffled queries, and a broken picture, which
    leaves the last of three workers without any."""
    ours, theirs = (torch.load(learned / name / "records.pt") for name in (case, "one"))
    assert [row[-1] for row in theirs] == [1, 1, 1]
    for (losses, norm, *counts), (wanted, wanted_norm, *wanted_counts) in zip(
        ours, theirs, strict=True
    ):
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
        assert counts == wanted_counts
    (_, ours), (_, theirs) = (after_first_step(learned / name) for name in (case, "one"))
    assert relative_difference(ours, theirs) < 3e-6


@pytest.mark.parametrize("case", [name for name in CASES if name != "one"])
def test_only_what_learns_nothing_but_rounding_errors_drifts_apart(
    learned: Path, case: str
) -> None:
    """A bias of the keys moves all scores of a query alike: its gradient is 0 but for rounding, and
    AdamW makes a step of up to lr of whatever there is."""
    ours, theirs = (torch.load(learned / name / "3.pt")["weights"] for name in (case, "one"))
    for name, wanted in theirs.items():
        drift = 3.5e-4 if name.endswith("in_proj_bias") else 2e-6
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=drift, msg=name)
