"""The machines of a cluster before a job: same versions, kernels, room for all workers, same files.

What a machine has is told by `querypatch doctor`, asked on every one of them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.doctor import Finding
from cluster.preflight.checks import Check, listed, plural
from cluster.stages import Recipe
from training.resources import Resources

MUST_AGREE = ("python", "torch", "ray", "querypatch")
"""Packages whose versions must be the same everywhere: processes speak to each other by them."""
SHOULD_AGREE = ("torchvision", "numpy", "webdataset", "safetensors", "fsspec")
"""Packages by which pictures and numbers are made: other versions may give other last bits."""


@dataclass(frozen=True)
class NodeFacts:
    """What one machine of the cluster said of itself."""

    name: str
    """Its address."""
    findings: tuple[Finding, ...]
    """Of the doctor."""
    cpus: float
    gpus: float
    """That Ray may give to workers."""
    missing: tuple[str, ...] = ()
    """Places of the recipe that this machine does not see, each with its key."""


def node_checks(recipe: Recipe, nodes: Sequence[NodeFacts]) -> Iterator[Check]:
    """All that the machines say together."""
    yield _versions(nodes)
    yield _broken(nodes)
    yield _places(nodes)
    yield _room(recipe.resources, nodes)


def machine_checks(recipe: Recipe, here: NodeFacts) -> Iterator[Check]:
    """The same of the one machine that starts all workers itself."""
    yield _broken([here])
    resources = recipe.resources
    wanted = resources.max_workers * resources.cpus_per_worker
    said = (
        f"{plural(resources.max_workers, 'worker')} of "
        f"{plural(resources.cpus_per_worker, 'core')} on {plural(int(here.cpus), 'core')}"
    )
    if wanted <= here.cpus:
        yield Check("workers", "well", said)
    else:
        yield Check("workers", "warning", f"{said}: they take turns; use fewer workers")


def workers_fitting(resources: Resources, nodes: Sequence[NodeFacts], with_gpus: bool) -> int:
    """How many workers find a place at once; each needs all it asks for on one machine."""
    cpus = resources.cpus_per_worker
    return sum(
        int(min(node.cpus // cpus, node.gpus)) if with_gpus else int(node.cpus // cpus)
        for node in nodes
    )


def takes_gpus(resources: Resources, nodes: Sequence[NodeFacts]) -> bool:
    """Whether workers take GPUs: as asked, or where there are enough for the fewest workers."""
    if resources.device != "auto":
        return resources.device == "cuda"
    return sum(node.gpus for node in nodes) >= resources.min_workers


def _versions(nodes: Sequence[NodeFacts]) -> Check:
    name = "versions"
    must = [line for package in MUST_AGREE for line in _disagreement(nodes, package)]
    if must:
        way_out = "use one image for all machines"
        return Check(name, "fault", f"{listed(must)}; {way_out}")
    should = [line for package in SHOULD_AGREE for line in _disagreement(nodes, package)]
    if should:
        way_out = "last bits may differ between machines; use one image for all"
        return Check(name, "warning", f"{listed(should)}; {way_out}")
    said = ", ".join(f"{package} {_version_of(nodes[0], package)}" for package in MUST_AGREE)
    return Check(name, "well", f"the same on {plural(len(nodes), 'machine')}: {said}")


def _disagreement(nodes: Sequence[NodeFacts], package: str) -> Iterator[str]:
    by_version = defaultdict[str, list[str]](list)
    for node in nodes:
        by_version[_version_of(node, package)].append(node.name)
    if len(by_version) > 1:
        yield f"{package}: " + ", ".join(
            f"{version} on {listed(names, 2)}" for version, names in sorted(by_version.items())
        )


def _version_of(node: NodeFacts, package: str) -> str:
    """The first word that the doctor says of it."""
    said = next((each.said for each in node.findings if each.name == package), "none")
    return said.partition(",")[0]


def _broken(nodes: Sequence[NodeFacts]) -> Check:
    found = _by_node(nodes, "broken")
    if found:
        lines = [f"{what} (on {listed(names, 2)})" for what, names in found.items()]
        return Check("kernels and packages", "fault", listed(lines))
    slow = _by_node(nodes, "slow")
    if slow:
        lines = [f"{what} (on {listed(names, 2)})" for what, names in slow.items()]
        way_out = "install the wheel that brings them"
        return Check("kernels and packages", "warning", f"{listed(lines)}; {way_out}")
    return Check(
        "kernels and packages", "well", f"as they should be on {plural(len(nodes), 'machine')}"
    )


def _by_node(nodes: Sequence[NodeFacts], state: str) -> Mapping[str, list[str]]:
    found = defaultdict[str, list[str]](list)
    for node in nodes:
        for each in node.findings:
            if each.state == state:
                found[f"{each.name}: {each.said}"].append(node.name)
    return found


def _places(nodes: Sequence[NodeFacts]) -> Check:
    missing = defaultdict[str, list[str]](list)
    for node in nodes:
        for place in node.missing:
            missing[place].append(node.name)
    if not missing:
        return Check(
            "places", "well", f"{plural(len(nodes), 'machine')} see data, weights and run folder"
        )
    lines = [f"{place} is not seen by {listed(names, 2)}" for place, names in missing.items()]
    way_out = "give URLs of a store that all reach (s3://, gs://), or a folder that all share"
    return Check("places", "fault", f"{listed(lines)}; {way_out}")


def _room(resources: Resources, nodes: Sequence[NodeFacts]) -> Check:
    with_gpus = takes_gpus(resources, nodes)
    fitting = workers_fitting(resources, nodes, with_gpus)
    needs = f"{plural(resources.cpus_per_worker, 'core')}{' and a GPU' if with_gpus else ''}"
    facts = {"workers_fitting": fitting, "machines": len(nodes)}
    said = (
        f"{plural(fitting, 'worker')} of {needs} find a place on "
        f"{plural(len(nodes), 'machine')}, {resources.workers} are asked for"
    )
    if fitting >= resources.max_workers:
        return Check("workers", "well", said, facts)
    if fitting >= resources.min_workers and resources.is_elastic:
        return Check("workers", "warning", f"{said}: the run begins with fewer", facts)
    way_out = (
        f"say resources.workers={fitting}"
        if fitting
        else "use larger machines, or fewer resources.cpus_per_worker"
    )
    return Check(
        "workers",
        "fault",
        f"{said}: Ray would wait for more without a word, unless an autoscaler brings them; "
        f"{way_out}, or add machines",
        facts,
    )
