"""The CUDA kernels compiled for every architecture without a GPU, and where the result is kept."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from models.ops import nvrtc
from tests.models.ops.cuda_cases import grad_output_of, inputs_of, meant
from tests.models.ops.emulated import (
    Emulated,
    EmulatedError,
    compiler_is_there,
    program,
    without_memory,
)

ARCHITECTURES = (80, 90, 100, 120)
ENCODER = "QUERYPATCH_FIXED(bf16,bf16,bf16,32,4,4)"
COMMON = f"{ENCODER} QUERYPATCH_FIXED(f32,f32,f32,32,4,4) QUERYPATCH_ANY(f32)"


def nvrtc_is_there() -> bool:
    try:
        nvrtc.find_nvrtc()
    except nvrtc.NvrtcError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not nvrtc_is_there(), reason="needs libnvrtc")


def tool(name: str) -> Path:
    """cuobjdump and nvdisasm come with a toolkit, and with triton."""
    on_path, triton = shutil.which(name), find_spec("triton")
    if on_path is not None:
        return Path(on_path)
    for place in (triton and triton.submodule_search_locations) or ():
        beside = Path(place) / "backends" / "nvidia" / "bin" / name
        if beside.exists():
            return beside
    pytest.skip(f"needs {name}, of the CUDA toolkit or of triton")


@cache
def compile_for(architecture: int, kernels: str) -> bytes:
    source = f"#define QUERYPATCH_ONLY {kernels}\n{program()}"
    return nvrtc.find_nvrtc().compile(source, architecture)


def standard_kernels() -> str:
    """What a build with nvcc has, all of it."""
    text = program()
    standard = re.findall(r"^QUERYPATCH_STANDARD\((\w+), (\w+), (\w+)\)$", text, re.MULTILINE)
    fixed = [
        f"QUERYPATCH_FIXED({','.join(types)},{channels},4,4)"
        for types in standard
        for channels in (16, 32, 64)
    ]
    assert len(fixed) == 15
    return " ".join([*fixed, *re.findall(r"^QUERYPATCH_ANY\(\w+\)$", text, re.MULTILINE)])


def resources(cubin: bytes, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and the like of each kernel."""
    (folder / "kernels.cubin").write_bytes(cubin)
    told = subprocess.run(
        [tool("cuobjdump"), "-res-usage", folder / "kernels.cubin"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.findall(r"Function (\w+):\n\s+(.*)", told)
    return {
        name: {word: int(number) for word, number in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in found
    }


def instructions(cubin: bytes, folder: Path) -> dict[str, list[str]]:
    """The opcodes of each kernel."""
    (folder / "kernels.cubin").write_bytes(cubin)
    told = subprocess.run(
        [tool("nvdisasm"), "-c", folder / "kernels.cubin"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    kernels = re.split(r"^\.text\.(\w+):$", told, flags=re.MULTILINE)[1:]
    opcode = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return {
        name: opcode.findall(text) for name, text in zip(kernels[::2], kernels[1::2], strict=True)
    }


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_common_kernels_compile_and_keep_to_registers(
    architecture: int, tmp_path: Path
) -> None:
    used = resources(compile_for(architecture, COMMON), tmp_path)
    assert len(used) == 2 + 2 + 7
    assert_fits(used)


@needs_nvrtc
@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_keeps_to_registers(architecture: int, tmp_path: Path) -> None:
    used = resources(compile_for(architecture, standard_kernels()), tmp_path)
    assert len(used) == 2 * 15 + 4 * 7
    assert_fits(used)


def assert_fits(used: dict[str, dict[str, int]]) -> None:
    for name, numbers in used.items():
        assert numbers["STACK"] == numbers["LOCAL"] == 0, f"{name} spills"
        assert numbers["SHARED"] <= 48 * 1024, f"{name} takes {numbers['SHARED']} bytes of a block"
        most = 255 if "_16_4_4" in name else 128 if name.count("_") < 6 else 102
        assert numbers["REG"] <= most, f"{name} takes {numbers['REG']} registers"


@needs_nvrtc
def test_four_neighbours_are_added_by_one_instruction_where_there_is_one(tmp_path: Path) -> None:
    of_90 = instructions(compile_for(90, COMMON), tmp_path)
    of_80 = instructions(compile_for(80, COMMON), tmp_path)
    name = "backward_bf16_bf16_bf16_32_4_4"
    added = [code for code in of_90[name] if code.startswith("RED")]
    assert added
    assert all(".F32x4." in code for code in added)
    assert any(code.startswith("RED.E.ADD.F32") for code in of_80[name])


@needs_nvrtc
@pytest.mark.parametrize(("direction", "width"), [("forward", ".128"), ("backward", ".64")])
def test_a_lane_loads_its_channels_of_a_cell_at_once(
    direction: str, width: str, tmp_path: Path
) -> None:
    """16 bytes of bfloat16; in a backward what 16 bytes of the float32 sums belong to."""
    opcodes = instructions(compile_for(90, COMMON), tmp_path)[f"{direction}_bf16_bf16_bf16_32_4_4"]
    loads = [code for code in opcodes if code.startswith("LDG")]
    wide = [code for code in loads if width in code]
    assert len(wide) >= 2 * 4  # two samples' corners at a time
    assert not [code for code in opcodes if code.startswith(("STL", "LDL", "BAR"))]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for kept machine code, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "store"))
    nvrtc.compiled.cache_clear()
    yield tmp_path / "store" / "querypatch"
    nvrtc.compiled.cache_clear()


TINY = 'extern "C" __global__ void add(int* to) { *to += 1; }'


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Architectures that were compiled for."""
    done: list[int] = []
    really = nvrtc.Nvrtc.compile

    def counted(self: nvrtc.Nvrtc, source: str, architecture: int) -> bytes:
        done.append(architecture)
        return really(self, source, architecture)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", counted)
    return done


@needs_nvrtc
def test_machine_code_is_compiled_once_and_kept(store: Path, compilations: list[int]) -> None:
    first = nvrtc.compiled(TINY, "", 90)
    nvrtc.compiled.cache_clear()  # as a new process
    assert nvrtc.compiled(TINY, "", 90) == first
    assert compilations == [90]
    assert [file.suffix for file in store.iterdir()] == [".cubin"]
    nvrtc.compiled(TINY, "", 80)
    nvrtc.compiled(TINY + "\n", "", 90)
    assert compilations == [90, 80, 90]
    assert len(list(store.iterdir())) == 3


@needs_nvrtc
@pytest.mark.parametrize("rest", [b"", b"half", b"x" * 4000])
def test_a_broken_file_is_compiled_again(store: Path, compilations: list[int], rest: bytes) -> None:
    first = nvrtc.compiled(TINY, "", 90)
    (file,) = store.iterdir()
    file.write_bytes(rest)
    nvrtc.compiled.cache_clear()
    assert nvrtc.compiled(TINY, "", 90) == first
    assert nvrtc.read_cubin(file) == first
    assert compilations == [90, 90]


@needs_nvrtc
def test_machine_code_is_kept_in_memory_where_the_disk_does_not_take_it(
    store: Path, compilations: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    store.parent.write_text("a file where a folder would have to be")
    with caplog.at_level("INFO", logger=nvrtc.__name__):
        first = nvrtc.compiled(TINY, "", 90)
    assert "kept in memory only" in caplog.text
    assert nvrtc.compiled(TINY, "", 90) == first
    assert compilations == [90]


def test_a_file_that_cannot_be_finished_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    nvrtc.write_cubin(tmp_path / "a.cubin", b"code")
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert nvrtc._cache_file("a.cubin") is None


@needs_nvrtc
def test_what_the_compiler_complains_of_is_said_in_one_line() -> None:
    with pytest.raises(nvrtc.NvrtcError, match=r'for sm_90: .*identifier "y" is undefined$'):
        nvrtc.find_nvrtc().compile("__global__ void f(int* x) { *x = y; }", 90)
    with pytest.raises(nvrtc.NvrtcError, match=r"sm_1: .*invalid value for --gpu-architecture"):
        nvrtc.find_nvrtc().compile("", 1)


def test_without_a_compiler_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    nvrtc.find_nvrtc.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(nvrtc.NvrtcError, match="not installed; install torch built for CUDA or"):
        nvrtc.find_nvrtc()


def test_a_build_without_a_program_says_so() -> None:
    with pytest.raises(nvrtc.NvrtcError, match="carries no CUDA program"):
        nvrtc.compiled("", ENCODER, 90)


@pytest.fixture
def lent(emulated: Emulated, store: Path, tmp_path: Path) -> Emulated:
    """A library that knows no kernel and has models.ops.nvrtc for its compiler."""
    fresh = without_memory(emulated, tmp_path)
    text = ctypes.create_string_buffer(program().encode())
    fresh.calls.emulated_program(text)
    nvrtc.lend_compiler(fresh.calls)
    fresh.compiler = text
    return fresh


@needs_nvrtc
@pytest.mark.skipif(not compiler_is_there(), reason="needs g++")
def test_the_library_has_its_kernels_compiled_when_they_are_first_used(
    lent: Emulated, store: Path
) -> None:
    inputs = inputs_of((torch.float32,) * 3, 4, 2, 1, 2)
    assert (lent.forward(inputs) - meant(inputs)).abs().max() < 1e-5
    assert len(list(store.iterdir())) == 1
    lent.backward(inputs, grad_output_of(inputs))  # the references' gradient is another's kernel
    assert len(list(store.iterdir())) == 2


@pytest.mark.skipif(not compiler_is_there(), reason="needs g++")
def test_a_missing_compiler_is_an_error_of_the_call(
    lent: Emulated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> nvrtc.Nvrtc:
        raise nvrtc.NvrtcError("libnvrtc of CUDA 13 is not installed")

    monkeypatch.setattr(nvrtc, "find_nvrtc", none)
    inputs = inputs_of((torch.float32,) * 3, 4, 2, 1, 2)
    with pytest.raises(EmulatedError, match="no CUDA kernel forward_f32 for cuda:0: libnvrtc"):
        lent.forward(inputs)
    assert "slower kernels for any shape replace QUERYPATCH_FIXED" in caplog.text
