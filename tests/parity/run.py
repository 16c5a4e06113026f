"""Which runner a case takes, and the report."""

from collections.abc import Iterator
from pathlib import Path

from tests.parity.case import (
    Case,
    Finding,
    NotSupportedError,
    find_cases,
    never_compared,
    read_case,
    worst_by_group,
)
from tests.parity.conditional import run_conditional
from tests.parity.criterion import run_criterion, run_postprocess
from tests.parity.dat import run_dat_case
from tests.parity.deformable import run_deformable
from tests.parity.detector import run_detector, run_patch_detector
from tests.parity.msda import run_operator
from tests.parity.panoptic import run_panoptic

_CONDITIONAL = ("conditional_detr", "dab_detr")
_DEFORMABLE = ("deformable_detr", "efficient_detr", "sparse_detr")


def run_all(folder: Path) -> bool:
    """Run and print every case of a folder; True where all ran and kept their tolerances."""
    verdicts = [_run_and_print(path) for path in find_cases(folder)]
    passed = sum(verdicts)
    print(f"{passed} of {len(verdicts)} cases pass")
    return passed == len(verdicts)


def run_case(case: Case) -> tuple[Finding, ...]:
    """Every comparison of a case; NotSupportedError where the project lacks what it needs."""
    return tuple(_runner(case))


def _runner(case: Case) -> Iterator[Finding]:
    kind = case.model
    if kind.startswith(("detr_", "updetr_finetune_")):
        return run_detector(case)
    if kind.startswith(_CONDITIONAL):
        return run_conditional(case)
    if any(name in kind for name in _DEFORMABLE):
        return run_deformable(case)
    if kind.startswith("updetr_pretrain_"):
        return run_patch_detector(case)
    if kind.startswith("dat_"):
        return run_dat_case(case)
    if kind.startswith("panoptic_"):
        return run_panoptic(case)
    if kind in ("criterion_detr", "criterion_updetr"):
        return run_criterion(case)
    if kind == "postprocess_detr":
        return run_postprocess(case)
    if kind == "msda_op":
        return run_operator(case)
    raise NotSupportedError(f"the model {kind}")


def _run_and_print(path: Path) -> bool:
    try:
        case = read_case(path)
        findings = run_case(case)
    except NotSupportedError as lacking:
        print(f"{path.stem}: FAILED, not supported yet: {lacking}")
        return False
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        print(f"{path.stem}: FAILED, could not be run: {type(error).__name__}: {error}")
        return False
    passed = not any(finding.misses for finding in findings)
    print(f"{path.stem}: {'ok' if passed else 'FAILED'}")
    for finding in worst_by_group(findings):
        mark = "MISS" if finding.misses else "    "
        amount = f"{finding.error:9.2e} of {finding.tolerance:7.1e}"
        print(f"  {mark} {finding.group:<16} {amount}  {finding.where}")
    unseen = never_compared(case, findings)
    if unseen:
        print(f"       not compared: {', '.join(unseen)}")
    return passed
