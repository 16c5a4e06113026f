"""Where the operator library is missing, old or for another device; and what is said of it."""

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.ops import deformable, reference
from models.ops.library import SCHEMA, Library, Missing, load_library, open_library
from tests.models.ops.cases import Sizes, inputs, run

SIZES = Sizes(levels=2)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(deformable, "_LIBRARY", Missing("querypatch_ops is not installed; make it"))
    deformable._say_once.cache_clear()
    yield
    deformable._say_once.cache_clear()


@pytest.mark.usefixtures("without_library")
def test_without_the_library_the_plain_operator_computes_and_one_line_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = inputs(SIZES)
    with caplog.at_level(logging.INFO):
        found = run(deformable.deformable_attention, SIZES, given)
        run(deformable.deformable_attention, SIZES, given)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "plain PyTorch: querypatch_ops is not installed; make it" in record.getMessage()
    wanted = run(reference.deformable_attention, SIZES, given)
    assert all(map(torch.equal, found, wanted))
    assert deformable.describe(torch.device("cuda")).startswith("plain PyTorch: querypatch_ops is")


@pytest.mark.usefixtures("without_library")
def test_on_a_gpu_nothing_slow_happens_in_silence() -> None:
    with pytest.raises(RuntimeError, match=r"on cuda: querypatch_ops is not.*ops\.allow_reference"):
        deformable._runs_compiled("cuda")
    deformable.set_allow_reference(True)
    try:
        assert not deformable._runs_compiled("cuda")
    finally:
        deformable.set_allow_reference(False)


def test_a_device_nobody_wrote_kernels_for_is_named() -> None:
    with pytest.raises(RuntimeError, match="no compiled deformable attention on mps"):
        deformable._runs_compiled("mps")


def test_a_file_that_is_no_library_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    broken = tmp_path / "querypatch_ops.so"
    broken.write_bytes(b"not a library")
    missing = open_library(str(broken))
    assert isinstance(missing, Missing)
    assert "cannot be loaded" in missing.reason


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_library_of_another_schema_is_refused_with_both_numbers(tmp_path: Path) -> None:
    source, other = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text(f'extern "C" int querypatch_schema() {{ return {SCHEMA + 1}; }}')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    missing = open_library(str(other))
    assert isinstance(missing, Missing)
    assert f"schema {SCHEMA + 1}, this querypatch expects {SCHEMA}" in missing.reason


@pytest.mark.skipif(not isinstance(load_library(), Library), reason="needs the operator library")
def test_the_doctor_hears_which_kernels_run() -> None:
    said = deformable.describe(torch.device("cpu"))
    assert said.startswith("compiled, ")
    assert said.rpartition(" ")[2] in ("baseline", "avx2", "avx512")
    assert "plain PyTorch: there are no kernels for mps" in deformable.describe(torch.device("mps"))


@pytest.mark.skipif(not isinstance(load_library(), Library), reason="needs the operator library")
def test_which_kernels_run_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    deformable._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            run(deformable.deformable_attention, SIZES, inputs(SIZES))
    assert [record.levelno for record in caplog.records] == [logging.INFO]
