"""`querypatch chaos`: random fault schedules on a tiny run, each held to a run without faults.

Workers are processes of this machine, without Ray: under test is what a worker does (the stream,
the loop, checkpoints, the run's folder), through hundreds of starts in minutes. A schedule can be
repeated alone by its seed and number.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from rich.console import Console
from torch import Tensor

from cluster.chaos.check import (
    Course,
    Differs,
    check_equal,
    check_same_batches,
    check_tidy,
    course_of,
    distance,
)
from cluster.chaos.data import drawn_shards
from cluster.chaos.group import (
    Ended,
    Group,
    Place,
    run_attempt,
    trained_together,
    wait_for_end,
)
from cluster.chaos.schedule import (
    Attempt,
    Fault,
    Schedule,
    Store,
    StoreAway,
    StoreStumbles,
    Terminate,
    TornUploads,
    draw_schedule,
    schedule_lines,
)
from cluster.chaos.store import PROTOCOL
from cluster.chaos.worker import LEASE
from cluster.stages import Recipe, StageName, found_recipe, parsed_recipe
from training.checkpoint import load_newest
from training.recipe import RecipeError, override, parse_recipe, recipe_yaml
from training.run_folder import open_run_folder

TOLERANCE = 1e-3
"""How far weights may end from those of another number of workers, as a share of their way."""
MORE_ATTEMPTS = 4
"""Starts after the last attempt of a schedule before its run is given up."""


class ChaosFound(RuntimeError):  # noqa: N818
    """Schedules whose run did not end as the run without faults."""


@dataclass(frozen=True)
class Verdict:
    """What became of one schedule."""

    schedule: Schedule
    attempts: tuple[Ended, ...]
    difference: str | None
    """How its run is not the one without faults; None where it is."""
    apart: float | None
    """Distance from the run of the first number of workers alone; None where there was no other."""
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Where schedules run, and on what."""

    out: Path
    stage: StageName
    values: Mapping[str, object]
    """Of the recipe."""
    steps: int
    """Updates of the run."""
    calm: dict[tuple[int, ...], Course] = field(default_factory=dict)
    """The runs without faults so far, by their workers at every update."""


def run_chaos(
    name: str,
    overrides: Sequence[str],
    seed: int,
    numbers: Sequence[int],
    out: Path,
    console: Console,
) -> None:
    """Runs schedules of a seed and tells of each; the folders of those that differ are kept.

    Raises ChaosFound where one differs; RecipeError.
    """
    bench = open_bench(name, overrides, out)
    verdicts: list[Verdict] = []
    for number in numbers:
        verdicts.append(run_schedule(bench, draw_schedule(seed, number)))
        console.print("\n".join(verdict_lines(verdicts[-1])), highlight=False, markup=False)
    tell_all(verdicts, seed, out, console)


def tell_all(verdicts: Sequence[Verdict], seed: int, out: Path, console: Console) -> None:
    """Raises ChaosFound where a schedule differs."""
    console.print(summary(verdicts), highlight=False, markup=False)
    wrong = [verdict.schedule.number for verdict in verdicts if verdict.difference]
    if wrong:
        again = " ".join(f"--only {number}" for number in wrong)
        raise ChaosFound(
            f"{len(wrong)} of {len(verdicts)} schedules did not end as the run without faults; "
            f"what they left is in {out}; repeat them with --seed {seed} {again}"
        )


def open_bench(name: str, overrides: Sequence[str], out: Path) -> Bench:
    """A folder to run schedules of a recipe in; pictures are drawn where it names no shards.

    Raises RecipeError: mistakes in the recipe, or its length is not in updates.
    """
    stage, source = found_recipe(name)
    values = override(parse_recipe(source), overrides)
    out = out.absolute()
    data = values.get("data")
    if stage == "pretrain" and not (isinstance(data, Mapping) and data.get("shards")):
        values = override(values, [f"data.shards={drawn_shards(out)}"])
    recipe = parsed_recipe(override(values, [f"run={out / 'none'}"]), (), stage)
    if recipe.loop.steps is None:
        raise RecipeError("loop.steps is not said; chaos needs a run of some updates, e.g. 16")
    return Bench(out, stage, values, recipe.loop.steps)


Attempts = Callable[[Bench, Schedule, Path, list[Ended]], None]
"""Makes the starts of a schedule in a folder, and tells how each ended; raises Differs."""


def run_schedule(bench: Bench, schedule: Schedule) -> Verdict:
    """One schedule, with processes of this machine."""
    return judged(bench, schedule, "schedule", _attempt_all)


def judged(bench: Bench, schedule: Schedule, name: str, attempt_all: Attempts) -> Verdict:
    """One schedule in a folder of its own, which goes again where all is well."""
    home = bench.out / f"{name}-{schedule.seed}-{schedule.number}"
    shutil.rmtree(home, ignore_errors=True)
    attempts: list[Ended] = []
    began = time.monotonic()
    apart = difference = None
    try:
        attempt_all(bench, schedule, home, attempts)
        apart = check_schedule(bench, schedule, home, attempts)
        shutil.rmtree(home)
    except Differs as error:
        difference = str(error)
    return Verdict(schedule, tuple(attempts), difference, apart, time.monotonic() - began)


def verdict_lines(verdict: Verdict) -> list[str]:
    """A schedule and what became of it, for a person."""
    became = [
        f"     {number}. {'; '.join(ended.fired) or 'nothing happened'}: {_how(ended)}"
        for number, ended in enumerate(verdict.attempts, start=1)
    ]
    apart = "" if verdict.apart is None else f", {verdict.apart:.1e} from the first workers alone"
    equal = f"equal{apart}" if verdict.difference is None else f"DIFFERS: {verdict.difference}"
    return [*schedule_lines(verdict.schedule), *became, f"  {equal} ({verdict.seconds:.1f} s)"]


def summary(verdicts: Sequence[Verdict]) -> str:
    """All schedules in a few lines."""
    equal = [verdict for verdict in verdicts if verdict.difference is None]
    changed = [verdict.apart for verdict in equal if verdict.apart is not None]
    starts = [ended for verdict in verdicts for ended in verdict.attempts]
    fired = [text.split(" ")[0] for ended in starts for text in ended.fired]
    return "\n".join([
        f"{len(equal)} of {len(verdicts)} schedules are equal to the run without faults, in "
        f"{sum(verdict.seconds for verdict in verdicts):.0f} s",
        f"{len(starts)} starts, {len(fired)} faults that happened at a moment, "
        f"{sum(ended.ending != 'finished' for ended in starts)} groups of workers lost",
        f"{len(changed)} runs changed their workers; most distance from those of the first number "
        f"alone {max(changed, default=0.0):.1e} of the way, allowed {TOLERANCE:g}",
    ])  # fmt: skip


def _how(ended: Ended) -> str:
    plural = "" if ended.workers == 1 else "s"
    how = ended.ending if ended.step is None else f"returned after {ended.step} updates"
    if ended.refused:
        how = "refused: the run is another's"
    return f"{ended.workers} worker{plural} {how}"


def _attempt_all(bench: Bench, schedule: Schedule, home: Path, attempts: list[Ended]) -> None:
    """Starts the run until it is over; raises Differs where that does not go as it should."""
    frozen: list[Group] = []
    try:
        _start_until_done(bench, schedule, home, attempts, frozen)
    finally:
        left = wait_for_end(frozen)
    if left:
        raise Differs("workers that had been frozen did not end when the run was another's")


def taken_over(attempt: Attempt, ended: Ended) -> bool:
    """Whether a second start may have trained: the first could not renew its lease, and gave way.

    Whoever is cut off from the store goes on computing, writes nothing, and ends when it is back.
    """
    away_s = max(
        (fault.seconds for fault in attempt.faults if isinstance(fault, StoreAway)), default=0
    )
    return away_s >= LEASE.ttl_s and ended.refused is not None


def _start_until_done(
    bench: Bench, schedule: Schedule, home: Path, attempts: list[Ended], frozen: list[Group]
) -> None:
    more = [Attempt(schedule.last_workers)] * MORE_ATTEMPTS
    for number, attempt in enumerate((*schedule.attempts, *more), start=1):
        key = 100 * schedule.number + number
        recipe = recipe_at(bench, home / "run", schedule.store, schedule.loaders)
        place = _place(bench, recipe, attempt, home, number, key)
        found = run_attempt(attempt, place, frozen)
        attempts += found
        if len(found) > 1 and trained_together(*found) and not taken_over(attempt, found[0]):
            raise Differs(f"start {number}: a second start trained beside it, see {found[1].log}")
        for ended in found:
            is_calm = not attempt.faults and ended.refused is None
            if ended.ending != "finished" and is_calm:
                how = f"{ended.ending}: {last_line(ended.log)}"
                raise Differs(f"start {number} met no fault and was {how}")
        if any(ended.step is not None and ended.step >= bench.steps for ended in found):
            return
    raise Differs(f"the run is not over after {len(attempts)} starts")


def check_schedule(
    bench: Bench, schedule: Schedule, home: Path, attempts: Sequence[Ended]
) -> float | None:
    """How far the run ended from that of its first number of workers alone; None where it had no
    other.

    Raises Differs where it is not the run without faults.
    """
    folder = open_run_folder(_url(home / "run", schedule.store))
    found = course_of(folder, attempts)
    check_tidy(folder, [pid for ended in attempts for pid in ended.loaders])
    may_lack = any(_is_of_the_store(fault) for a in schedule.attempts for fault in a.faults)
    check_equal(found, _calm_course(bench, found.workers), may_lack)
    if len(set(found.workers)) == 1:
        return None
    alone = _calm_course(bench, (found.workers[0],) * bench.steps)
    check_same_batches(found, alone)
    apart = distance(found, alone, _first_weights(bench, found.workers[0]))
    if apart > TOLERANCE:
        raise Differs(
            f"weights ended {apart:.2g} of their way from those of {found.workers[0]} workers "
            f"alone, allowed {TOLERANCE:g}"
        )
    return apart


def _is_of_the_store(fault: Fault) -> bool:
    return isinstance(fault, StoreStumbles | StoreAway | TornUploads)


def _calm_course(bench: Bench, workers: tuple[int, ...]) -> Course:
    """The run without faults that has so many workers at every update; made once."""
    if workers not in bench.calm:
        parts = [(count, len(list(same))) for count, same in groupby(workers)]
        home = bench.out / ("calm-" + "-".join(f"{count}x{steps}" for count, steps in parts))
        shutil.rmtree(home, ignore_errors=True)
        attempts = _run_calmly(bench, parts, home)
        course = course_of(open_run_folder(str(home / "run")), attempts)
        if course.workers != workers:
            raise AssertionError(f"{home}: {course.workers} and not {workers}")
        bench.calm[workers] = course
    return bench.calm[workers]


def _first_weights(bench: Bench, workers: int) -> Mapping[str, Tensor]:
    """Weights after the first update: where the way begins."""
    home = bench.out / f"calm-{workers}x1"
    shutil.rmtree(home, ignore_errors=True)
    _run_calmly(bench, [(workers, 1), (0, 0)], home)
    snapshot = load_newest(open_run_folder(str(home / "run")))
    assert snapshot is not None
    return snapshot.model


def _run_calmly(bench: Bench, parts: Sequence[tuple[int, int]], home: Path) -> list[Ended]:
    """Starts of (workers, updates), each stopped where the next begins."""
    recipe = recipe_at(bench, home / "run", "disk", 0)
    attempts: list[Ended] = []
    for number, (workers, steps) in enumerate(parts, start=1):
        if not workers:
            break
        stop = () if number == len(parts) else (Terminate(steps - 1, None),)
        attempt = Attempt(workers, stop)
        (ended,) = run_attempt(attempt, _place(bench, recipe, attempt, home, number, 0), [])
        attempts.append(ended)
        if ended.ending != "finished":
            raise Differs(f"a run without faults was {ended.ending}: {last_line(ended.log)}")
    return attempts


def _place(
    bench: Bench, recipe: Recipe, attempt: Attempt, home: Path, number: int, key: int
) -> Place:
    return Place(
        folder=home / f"attempt-{number}",
        recipe=told_workers(recipe, attempt.workers),
        machines=home / "machines",
        key=key,
        poisoned_step=bench.steps // 2,
    )


def recipe_at(bench: Bench, run: Path, store: Store, loaders: int) -> Recipe:
    """The recipe with the run at its place; the shards lie in the same store unless loader
    processes read them too.
    """
    said = [f"run={_url(run, store)}", "resources.device=cpu"]
    said += [f"data.stream.processes={loaders}", "loop.log_every=1"]
    said += ["checkpoints.wait_for_store_minutes=0.05"]
    recipe = parsed_recipe(override(bench.values, said), (), bench.stage)
    if store == "objects" and not loaders and bench.stage == "pretrain":
        shards = parse_recipe(recipe_yaml(recipe))["data"]["shards"]  # type: ignore[index]
        return parsed_recipe(override(bench.values, [*said, f"data.shards={PROTOCOL}://{shards}"]))
    return recipe


def told_workers(recipe: Recipe, workers: int) -> str:
    """The recipe for so many workers, as YAML."""
    resources = recipe.resources.model_copy(update={"workers": workers})
    return recipe_yaml(recipe.model_copy(update={"resources": resources}))


def last_line(log: Path) -> str:
    """The end of a log and where it lies: why its workers ended."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no word'} ({log})"


def _url(run: Path, store: Store) -> str:
    return str(run) if store == "disk" else f"{PROTOCOL}://{run}"
