"""The CPU kernels under address sanitizer: good and bad inputs reach no byte that is not theirs."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.ops.cases import Sizes, inputs, run

PROJECT = Path(__file__).parents[3]


def _preloaded() -> str | None:
    """The sanitizer that g++ brings, if it does, and the C++ library, whose throws it watches."""
    if shutil.which("g++") is None or not sys.platform.startswith("linux"):
        return None
    files = []
    for name in ("libasan.so", "libstdc++.so"):
        said = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        files.append(Path(said.stdout.strip()).resolve())
    return ":".join(map(str, files)) if all(file.is_file() for file in files) else None


@pytest.mark.slow
@pytest.mark.skipif(_preloaded() is None, reason="g++ has no libasan here")
def test_no_input_makes_the_kernels_reach_beyond_their_memory(tmp_path: Path) -> None:
    flags = "-fsanitize=address -O1 -g1"
    build = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    build += ["--build-temp", str(tmp_path / "work")]
    _run(build, PROJECT, CXX="g++", CXXFLAGS=flags, LDFLAGS=flags, QUERYPATCH_CUDA_ARCHS="off")
    assert (tmp_path / "querypatch_ops.so").exists()
    code = "from tests.models.ops.test_sanitized import run_everything; run_everything()"
    for isa in ("", "baseline"):
        said = _run(
            ["-c", code],
            tmp_path / "work",
            PYTHONPATH=f"{tmp_path}{os.pathsep}{PROJECT}",
            LD_PRELOAD=str(_preloaded()),
            ASAN_OPTIONS="detect_leaks=0",
            QUERYPATCH_CPU_ISA=isa,
        )
        assert said.strip().endswith(f"all from {tmp_path / 'querypatch_ops.so'}")


def run_everything() -> None:
    """What the test runs in the sanitized process; it says which library it used."""
    from models.ops.library import Library, load_library
    from tests.models.ops.test_deformable import ASKED, EMPTY, drawn_sizes, ours_and_plain

    library = load_library()
    assert isinstance(library, Library)
    every = [*ASKED.values(), *EMPTY.values(), *map(drawn_sizes, range(12))]
    for sizes in every:
        ours, _ = ours_and_plain(sizes)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for threads in (1, 4):
                torch.set_num_threads(threads)
                run(ours, sizes, inputs(sizes, dtype=dtype))
    _run_wild_places()
    _run_wrong_arguments()
    print(f"all from {library.path}")


def _run_wild_places() -> None:
    from models.ops.deformable import deformable_attention

    draw = torch.Generator().manual_seed(0)
    for wild in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1.0, -1e-7):
        for queries in (2, 99):
            sizes = replace(Sizes(channels=32), queries=queries)
            given = inputs(sizes, dtype=torch.float32)
            places = torch.rand(given[1].shape, generator=draw) < 0.3
            given[1] = given[1].masked_fill(places, wild)
            run(deformable_attention, sizes, given)


def _run_wrong_arguments() -> None:
    from tests.models.ops.test_operators import WRONG, flat

    for sizes, place, change, _ in WRONG.values():
        given: list[Tensor] = inputs(sizes, dtype=torch.float32)
        given[place] = change(given[place])
        name = "fused_deformable_attention" if sizes.coordinates else "deformable_attention"
        with pytest.raises(RuntimeError, match="querypatch"):
            getattr(torch.ops.querypatch, name)(given[0], flat(sizes), *given[1:])


def _run(arguments: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:6000]}"
    return done.stdout
