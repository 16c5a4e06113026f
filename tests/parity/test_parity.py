"""Every case here is what public code computed: of DETR, UP-DETR, Deformable or Sparse DETR.

See `formula` for its inputs. The cases of ResNet-18 and those of deformable detectors with two or
three layers were made beside the shared ones, by the same code with other sizes and options.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.parity.case import NotSupportedError, find_cases, never_compared, read_case
from tests.parity.run import run_all, run_case

FOLDER = Path(__file__).parent
CASES = find_cases(FOLDER)


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_what_the_public_code_computes_is_computed_here(path: Path) -> None:
    case = read_case(path)
    findings = run_case(case)
    assert findings
    assert [finding for finding in findings if finding.misses] == []
    assert never_compared(case, findings) == ()


def test_a_difference_over_the_tolerance_is_a_miss_and_is_named() -> None:
    case = read_case(FOLDER / "cases" / "criterion_detr_empty.json")
    values = case.arrays["loss_values"] * np.float32(1.0001)
    findings = run_case(replace(case, arrays={**case.arrays, "loss_values": values}))
    assert {finding.where for finding in findings if finding.misses} == {
        *("loss_ce", "class_error", "cardinality_error", "loss_ce_0", "cardinality_error_0")
    }


def test_a_model_that_is_not_there_yet_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "other.json").write_text('{"model": "dab_x", "config": {}, "inputs": {}}')
    np.savez(tmp_path / "cases" / "other.npz", x=np.zeros(1))
    assert not run_all(tmp_path)
    assert "other: FAILED, not supported yet: the model dab_x" in capsys.readouterr().out
    with pytest.raises(NotSupportedError):
        run_case(read_case(tmp_path / "cases" / "other.json"))


def test_a_folder_without_cases_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cases"):
        run_all(tmp_path)
