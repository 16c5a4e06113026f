"""What a look before a job finds, and how it is told: one line each, a fault with its way out."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from threading import Thread
from typing import Literal, TypeVar

T = TypeVar("T")

State = Literal["well", "warning", "fault", "unchecked"]
"""Fault: the job would fail or lose work. Warning: it works, at a price. Unchecked: says why."""

KNOWN = (ValueError, OSError, ArithmeticError, RuntimeError, ImportError)
"""Errors whose message is one line with the way out, as the front door shows them."""

_WIDTH = 25
"""Columns of a check's name."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    said: str
    """What was found; of a fault what is wrong and the way out."""
    facts: Mapping[str, float | int | str | None] = field(default_factory=dict)
    """The numbers in it, for programs."""
    seconds: float = 0.0
    """That looking took; of several checks of one look, with the first."""


Hear = Callable[[Check], None]
"""Is told of every check as soon as it is done."""


class NoAnswerError(OSError):
    """Something did not answer in the time that was given to it."""


def looked_at(
    name: str,
    look: Callable[[], Iterable[Check]],
    hear: Hear,
    unless: Sequence[Check] = (),
) -> tuple[Check, ...]:
    """The checks that `look` makes, told to `hear`; an error with a way out is a fault of `name`.

    A fault among `unless` leaves it unchecked: it would only say the same again.
    """
    began = time.monotonic()
    found = list[Check]()
    before = first_fault(unless)
    if before is not None:
        found.append(Check(name, "unchecked", f"first mend {before.name}"))
    else:
        try:
            found += look()
        except KNOWN as error:
            found.append(Check(name, "fault", one_line(error)))
    if found:
        found[0] = replace(found[0], seconds=time.monotonic() - began)
    for check in found:
        hear(check)
    return tuple(found)


class Look:
    """Checks as they are made, each told to `hear` at once."""

    def __init__(self, hear: Hear) -> None:
        self.checks: list[Check] = []
        self._hear = hear

    def _add(
        self, name: str, look: Callable[[], Iterable[Check]], unless: Sequence[Check] = ()
    ) -> tuple[Check, ...]:
        """As `looked_at`."""
        found = looked_at(name, look, self._hear, unless)
        self.checks += found
        return found


def first_fault(checks: Iterable[Check]) -> Check | None:
    """The first that must be mended; None where there is none."""
    return next((check for check in checks if check.state == "fault"), None)


def within(seconds: float, what: str, ask: Callable[[], T]) -> T:
    """What `ask` gives; NoAnswerError where it takes longer. Its thread is then left behind."""
    answers, errors = list[T](), list[BaseException]()

    def asking() -> None:
        try:
            answers.append(ask())
        except KNOWN as error:
            errors.append(error)

    thread = Thread(target=asking, daemon=True, name=f"asking {what}")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise NoAnswerError(
            f"{what} does not answer within {seconds:g} s; check its URL, the endpoint and the "
            "network"
        )
    return answers[0]


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def listed(things: Sequence[object], shown: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(things) - shown} more" if len(things) > shown else ""
    return f"{'; '.join(map(str, things[:shown]))}{more}"


def plural(count: int, noun: str) -> str:
    """E.g. 1 machine, 2 machines."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def check_line(check: Check) -> str:
    """As `querypatch doctor` has them: what is not well is marked."""
    state = "" if check.state == "well" else check.state
    return f"{state:9} {check.name:{_WIDTH}}  {check.said}".rstrip()


def verdict_line(checks: Sequence[Check]) -> str:
    """The last line: may the job start?"""
    faults = [check.name for check in checks if check.state == "fault"]
    warnings = sum(check.state == "warning" for check in checks)
    if faults:
        return f"not ready: {', '.join(dict.fromkeys(faults))}"
    return f"ready, with {plural(warnings, 'warning')}" if warnings else "ready"


def checks_json(checks: Sequence[Check]) -> str:
    """The same for programs."""
    ready = first_fault(checks) is None
    return json.dumps({"ready": ready, "checks": [asdict(check) for check in checks]}, indent=1)
