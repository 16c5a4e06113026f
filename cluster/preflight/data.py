"""Are the pictures there, whole, as many as announced, and shared out evenly?

Files are held to their index by one listing; a sample of pictures, evenly spread, is read and
decoded as the stream will do it. Every byte is read only where `depth` is `whole`.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, assert_never

from cluster.preflight.checks import (
    Check,
    Hear,
    Look,
    NoAnswerError,
    listed,
    one_line,
    plural,
    within,
)
from cluster.preflight.pictures import PictureSet, label_checks, picture_checks
from cluster.stages import Recipe
from data.detection_set import DetectionSet, aligned
from data.index import ShardIndex, read_index
from data.order import batches_per_epoch, rank_streams
from data.shard_check import check_shards
from data.storage import file_sizes, open_folder, transient_errors
from data.write_records import REPORT_NAME, announced_samples
from finetune.recipe import SAME, FinetuneRecipe
from finetune.sets import open_sets
from finetune.task import TaskSets
from models.urls import public_url
from pretrain.recipe import PretrainRecipe

Depth = Literal["quick", "trial", "whole"]
"""Quick: no picture is read and no step tried. Whole: every byte of the data as well."""

ANSWER_S = 30.0
"""Seconds within which a store has to give the index and the listing of a set."""
UNEVEN = 4.0
"""Times the samples of the median shard at which one is named: it was cut, or joined of others."""
UNEVEN_SHARES = 1.2
"""The same of the pictures that two workers have of one batch."""


class DataLook(Look):
    """Looks at the pictures of a run; what it opened stays open for the trial step."""

    def __init__(self, recipe: Recipe, depth: Depth, hear: Hear) -> None:
        super().__init__(hear)
        self.index: ShardIndex | None = None
        """Of what is learned from, once it could be read."""
        self.sets: TaskSets | None = None
        """Of finetuning, once they could be opened."""
        self._recipe = recipe
        self._depth = depth

    def look(self) -> None:
        """Makes all checks."""
        recipe = self._recipe
        match recipe:
            case PretrainRecipe():
                self._look_at_folder("data.shards", recipe.data.shards)
                if recipe.data.held_out is not None:
                    self._look_at_folder("data.held_out", recipe.data.held_out)
            case FinetuneRecipe():
                self._look_at_sets(recipe)
            case _:
                assert_never(recipe)
        if self.index is not None:
            self._add("batches", partial(_batches, recipe, self.index))
        self._add("evaluation", partial(_evaluation, recipe))

    def _look_at_folder(self, key: str, url: str) -> None:
        def look() -> Iterator[Check]:
            opened.append(within(ANSWER_S, public_url(url), lambda: read_index(url)))
            yield _counted(key, opened[0], _file_faults(opened[0]))

        opened = list[ShardIndex]()
        found = self._add(key, look)
        if not opened:
            return
        if key == "data.shards":
            self.index = opened[0]
        self._look_into(PictureSet(key, opened[0], None, {}), found)

    def _look_at_sets(self, recipe: FinetuneRecipe) -> None:
        data = recipe.data
        places = {"data.train": (data.train, data.train_pictures)}
        if data.validation is not None and data.validation != SAME:
            places["data.validation"] = (data.validation, data.validation_pictures)
        labels = list[Check]()
        for key, (url, pictures) in places.items():
            look = partial(label_checks, recipe, key, url, pictures)
            labels += self._add(f"{key}: labels", look)
        self._add("data", partial(self._opened, recipe), labels)
        if self.sets is None:
            return
        self.index = self.sets.train.index
        for key, found in _different(self.sets).items():
            counted = self._add(key, partial(_counted_set, key, found))
            files = PictureSet(key, found.index, found.files, found.storage_options)
            self._look_into(files, counted)

    def _opened(self, recipe: FinetuneRecipe) -> Iterable[Check]:
        sets = open_sets(recipe)
        if sets.validation is not None:
            aligned(sets.validation.classes, sets.train.classes)
        self.sets = sets
        return ()

    def _look_into(self, pictures: PictureSet, unless: Sequence[Check]) -> None:
        key = pictures.key
        if self._depth != "quick":
            look = partial(picture_checks, self._recipe, pictures)
            self._add(f"{key}: pictures", look, unless)
        if self._depth == "whole" and pictures.files is None:
            self._add(f"{key}: bytes", partial(_every_byte, key, pictures.index.url), unless)


def _different(sets: TaskSets) -> dict[str, DetectionSet]:
    found = {"data.train": sets.train}
    if sets.validation is not None and sets.validation is not sets.train:
        found["data.validation"] = sets.validation
    return found


def _counted_set(key: str, found: DetectionSet) -> Iterator[Check]:
    if found.files is None:
        yield _counted(key, found.index, _file_faults(found.index))
    else:
        count = found.index.num_samples
        said = f"{public_url(found.url)}: {count} pictures, read as {found.kind}"
        yield Check(key, "well", said, {"pictures": count})


def _file_faults(index: ShardIndex) -> list[str]:
    """Shards that are not what the index says, by one listing, and pictures that are too few.

    Raises NoAnswerError.
    """
    folder = open_folder(index.url)
    shown = public_url(folder.url)
    try:
        sizes = within(ANSWER_S, shown, lambda: file_sizes(folder))
        announced = within(ANSWER_S, shown, lambda: announced_samples(folder))
    except NoAnswerError:
        raise
    except transient_errors(index.url) as error:
        return [f"it cannot be listed ({one_line(error)}); allow listing (s3:ListBucket)"]
    faults = [
        _size_fault(shard.name, shard.size, sizes.get(shard.name))
        for shard in index.shards
        if sizes.get(shard.name) != shard.size
    ]
    known = {shard.name for shard in index.shards}
    more = sorted(name for name in sizes if name.endswith(".tar") and name not in known)
    is_whole = all(shard.first is None for shard in index.shards)
    if more and is_whole:
        faults.append(
            f"{more[0]} is there, but not in the index ({len(more)} such tars): run `querypatch "
            f"shards index {shown}`, or take it away"
        )
    if is_whole and announced not in (None, index.num_samples):
        faults.append(
            f"{REPORT_NAME} announces {announced} pictures, the index has {index.num_samples}: "
            f"copy the whole folder again, or delete {REPORT_NAME} if some were taken away"
        )
    return faults


def _size_fault(name: str, wanted: int, found: int | None) -> str:
    if found is None:
        return f"{name} is in the index, but not there: copy it again"
    is_cut = "it is cut off" if found < wanted else "it was changed"
    return f"{name} holds {found} bytes where the index says {wanted}, {is_cut}: copy it again"


def _counted(key: str, index: ShardIndex, faults: Sequence[str]) -> Check:
    counts = [shard.num_samples for shard in index.shards] or [0]
    facts = {"pictures": index.num_samples, "shards": len(counts)}
    shown = public_url(index.url)
    if faults:
        return Check(key, "fault", f"{shown}: {listed(faults)}", facts)
    median = statistics.median(counts)
    said = (
        f"{shown}: {plural(index.num_samples, 'picture')} in {plural(len(counts), 'shard')} of "
        f"{min(counts)} to {max(counts)}"
    )
    if max(counts) > UNEVEN * max(median, 1):
        uneven = (
            f"the largest has {max(counts) / max(median, 1):.1f} times the median's: write shards "
            "of one size (`querypatch shards write`)"
        )
        return Check(key, "warning", f"{said}; {uneven}", facts)
    return Check(key, "well", said, facts)


def _batches(recipe: Recipe, index: ShardIndex) -> Iterator[Check]:
    """How an epoch is cut into batches, and a batch among the workers.

    Raises ValueError where the data hold no whole batch.
    """
    batches = batches_per_epoch(index, recipe.global_batch, recipe.data.order)
    workers = recipe.resources.max_workers
    shares = [len(rank_streams(recipe.global_batch, rank, workers)) for rank in range(workers)]
    facts = {"batches_per_epoch": batches, "most_pictures_of_a_worker": max(shares)}
    left = max(0, index.num_samples - batches * recipe.global_batch)
    said = (
        f"{batches} of {plural(recipe.global_batch, 'picture')} in an epoch, {left} left out; "
        f"{max(shares)} for each of {plural(workers, 'worker')}"
    )
    if max(shares) <= UNEVEN_SHARES * min(shares):
        yield Check("batches", "well", said, facts)
        return
    even = next(count for count in range(workers, 0, -1) if recipe.global_batch % count == 0)
    yield Check(
        "batches",
        "warning",
        f"{said}, {min(shares)} for some, who wait for the others; resources.workers={even} "
        "shares the batch evenly",
        facts,
    )


def _evaluation(recipe: Recipe) -> Iterator[Check]:
    """A rhythm of evaluations without pictures to judge on does nothing."""
    match recipe:
        case PretrainRecipe():
            key, judged = "data.held_out", recipe.data.held_out
        case FinetuneRecipe():
            key, judged = "data.validation", recipe.data.validation
        case _:
            assert_never(recipe)
    loop = recipe.loop
    is_asked = loop.evaluate_every is not None or loop.evaluate_every_epochs is not None
    if judged is None and is_asked:
        said = f"{key} is not given: nothing is evaluated during the run; give a set, or "
        yield Check("evaluation", "warning", f"{said}loop.evaluate_every=null")


def _every_byte(key: str, url: str) -> Iterator[Check]:
    faults = check_shards(url)
    name = f"{key}: bytes"
    if faults:
        yield Check(name, "fault", listed(faults))
    else:
        yield Check(name, "well", "every byte is what the index says, every picture decodes")
