"""Does a cluster fit? `querypatch doctor` as a short job there, held to what our code needs.

Asked in the very environment that the job will have: the same code, variables and pins.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version
from ray.job_submission import JobSubmissionClient

from cluster.jobs.client import JobsError, in_one_line
from cluster.jobs.queue import wait_for_end
from cluster.jobs.submitting import Order, submit

WITHIN_S = 300
"""Seconds that the answer may take: an image is pulled, or packages are installed."""


class MisfitCluster(JobsError):  # noqa: N818
    """A cluster that our code cannot run on; one line for each reason."""


def check_cluster(
    client: JobSubmissionClient, environment: Mapping[str, str], pins: Sequence[str]
) -> tuple[str, ...]:
    """Asks the cluster what it has; returns what is worth a word though it fits.

    Raises MisfitCluster, or JobsError where it does not answer in time.
    """
    found = _doctor(client, environment, pins)
    faults = (*_broken(found), *_too_old(found))
    if faults:
        lines = "\n  ".join(faults)
        raise MisfitCluster(f"{client.get_address()} does not fit:\n  {lines}")
    return (*_differences(found), *_slow(found))


def pins_of_this_machine() -> tuple[str, ...]:
    """Our dependencies as they are installed here, for pip, but for Ray, which a cluster is of."""
    names = [Requirement(text) for text in _requirements()]
    pins = []
    for name in dict.fromkeys(each.name for each in names if each.name != "ray"):
        try:
            pins.append(f"{name}=={Version(version(name)).public}")
        except PackageNotFoundError:
            continue
    return tuple(pins)


def _doctor(
    client: JobSubmissionClient, environment: Mapping[str, str], pins: Sequence[str]
) -> tuple[Mapping[str, str], ...]:
    """The doctor's findings on the cluster: name, state and what was said."""
    id = submit(client, Order(("doctor", "--json"), "doctor"), environment, pins)
    job = wait_for_end(client, id, WITHIN_S)
    url = client.get_address()
    if job is None:
        raise JobsError(
            f"{url} did not say in {WITHIN_S} s what it has installed (job {id}); see "
            f"`querypatch logs {id} --address {url}`, or go on with --no-check"
        )
    with in_one_line(url):
        log = client.get_job_logs(id)
    found = _findings(log)
    if found is None:
        raise MisfitCluster(
            f"{url} could not run `querypatch doctor` ({_last_line(log) or job.message}); its "
            f"image needs querypatch's dependencies, or --install (docs/cluster.md); job {id}"
        )
    return found


def _findings(log: str) -> tuple[Mapping[str, str], ...] | None:
    """The JSON among a log's other lines."""
    lines = log.splitlines()
    begins = [number for number, line in enumerate(lines) if line == "{"]
    ends = [number for number, line in enumerate(lines) if line == "}"]
    if not begins or not ends:
        return None
    content = json.loads("\n".join(lines[begins[0] : ends[-1] + 1]))
    return tuple(content["findings"])


def _broken(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for finding in found:
        if finding["state"] == "broken":
            yield f"{finding['name']}: {finding['said']}"


def _too_old(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    there = {finding["name"]: _version_in(finding["said"]) for finding in found}
    for text in _requirements():
        needed = Requirement(text)
        has = there.get(needed.name)
        if has is not None and not needed.specifier.contains(has, prereleases=True):
            yield f"{needed.name} {has}: needs {needed.specifier}; renew the image, or --install"


def _differences(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Results may then differ in their last bits from those of this machine."""
    here = {"python": _python(), **{name: Version(version(name)) for name in ("torch", "ray")}}
    for finding in found:
        has, own = _version_in(finding["said"]), here.get(finding["name"])
        if has is not None and own is not None and has.release[:2] != own.release[:2]:
            yield f"the cluster has {finding['name']} {has}, this machine {own}"


def _slow(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for finding in found:
        if finding["state"] == "slow":
            yield f"slow on the cluster's head: {finding['name']}, {finding['said']}"


def _python() -> Version:
    return Version(platform.python_version())


def _requirements() -> list[str]:
    """Of the installed querypatch, without its extras."""
    try:
        texts = requires("querypatch") or []
    except PackageNotFoundError:
        return []
    return [text for text in texts if "extra ==" not in text]


def _version_in(said: str) -> Version | None:
    word = said.partition(",")[0].partition(" ")[0]
    try:
        return Version(word)
    except ValueError:
        return None


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else ""
