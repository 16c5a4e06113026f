"""Builds the operator library `querypatch_ops`; everything else stands in pyproject.toml.

Needs a C++17 compiler ($CXX, g++ or clang++) and nothing of torch: libtorch's functions are found
when torch loads the library, so one binary serves torch 2.11 and newer, with CUDA and without. With
nvcc ($CUDA_HOME/bin or on the PATH) the CUDA kernels are compiled too; without it their source is
carried and compiled at first use. QUERYPATCH_CUDA_ARCHS="80;90" chooses the architectures, "off"
none. Where there is no compiler, or it fails, the package installs without the library and says so.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("models/ops/csrc")
ARCHITECTURES = "80;90;100;120"
"""The oldest of each generation, whose machine code the later ones run: 80 serves 86 and 89."""
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
X86_LEVELS = {"cpu_v3.cpp": "-march=x86-64-v3", "cpu_v4.cpp": "-march=x86-64-v4"}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_ELF = sys.platform.startswith("linux")
CAN_BUILD = IS_ELF or sys.platform == "darwin"


class BuildLibrary(build_ext):
    """Compiles models/ops/csrc into one library that is not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        """The same for every Python."""
        return f"{fullname}.so"

    def build_extension(self, ext: Extension) -> None:
        """Never fails: what is missing is said in a warning."""
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        work = Path(self.build_temp).absolute()
        work.mkdir(parents=True, exist_ok=True)
        try:
            build_library(work, target)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = _last_line(error)
            _warn(f"the operator library could not be compiled ({reason}); plain PyTorch is used")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: beside the checkout's top-level files."""
        built = Path(self.build_lib, self.get_ext_filename("querypatch_ops"))
        if built.exists():
            fresh = Path(f"{built.name}.new")
            shutil.copy2(built, fresh)
            # Written over in place it would crash every process that has it loaded.
            fresh.replace(built.name)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-any where nothing was compiled."""
        python, abi, system = super().get_tag()
        return ("py3", "none", system) if self.distribution.ext_modules else (python, abi, system)


def build_library(work: Path, target: Path) -> None:
    """Compiles, with the CUDA program embedded, and links.

    Raises OSError or CalledProcessError, with the compiler's words in `stderr`.
    """
    compiler = find_compiler()
    assert compiler is not None
    program = work / "cuda_program.cu"
    program.write_text(_with_headers(SOURCES / "cuda_kernels.cu", set()) if IS_ELF else "")
    sources = sorted(SOURCES.glob("*.cpp"))
    if not IS_X86:
        sources = [source for source in sources if source.name not in X86_LEVELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = [pool.submit(_compile, compiler, source, work) for source in sources]
        embedded = work / "embedded.cpp"
        embedded.write_text(_embedding(program, _cubins(program, work, pool)))
        objects = [job.result() for job in compiling]
    _link(compiler, [*objects, _compile(compiler, embedded, work)], work, target)


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler that runs, or None."""
    for words in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        command = shlex.split(words)
        if command and shutil.which(command[0]):
            return command
    return None


def find_nvcc() -> str | None:
    """From CUDA_HOME, which is meant, before the PATH's, which may be any."""
    home = os.environ.get("CUDA_HOME", "")
    return (shutil.which(f"{home}/bin/nvcc") if home else None) or shutil.which("nvcc")


def _compile(compiler: Sequence[str], source: Path, work: Path) -> Path:
    made = work / f"{source.stem}.o"
    flags = [*FLAGS, *(["-DQUERYPATCH_X86"] if IS_X86 else []), f"-I{SOURCES}"]
    flags += [X86_LEVELS[source.name]] if source.name in X86_LEVELS else []
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    _run([*compiler, *flags, "-c", str(source), "-o", str(made)])
    return made


def _link(compiler: Sequence[str], objects: Sequence[Path], work: Path, target: Path) -> None:
    """Against an empty stand-in for libtorch_cpu, whose name alone matters."""
    files = [str(made) for made in objects]
    flags = shlex.split(os.environ.get("LDFLAGS", ""))
    if IS_ELF:
        stand_in = work / "libtorch_cpu.so"
        empty = ["-shared", "-nostdlib", "-x", "c++", os.devnull]
        _run([*compiler, *empty, "-Wl,-soname,libtorch_cpu.so", "-o", str(stand_in)])
        flags += ["-Wl,--unresolved-symbols=ignore-all", "-Wl,--no-as-needed", f"-L{work}"]
        flags += ["-l:libtorch_cpu.so", "-ldl"]
    else:
        flags += ["-undefined", "dynamic_lookup"]
    _run([*compiler, "-shared", *files, *flags, "-o", str(target)])


def _with_headers(file: Path, seen: set[str]) -> str:
    """The file with each include of a neighbouring .cuh replaced by its text, once."""

    def text_of(include: re.Match[str]) -> str:
        name = include[1]
        if name in seen:
            return ""
        seen.add(name)
        return _with_headers(SOURCES / name, seen)

    text = re.sub(r'^#include "(\w+\.cuh)"$', text_of, file.read_text(), flags=re.MULTILINE)
    return text.replace("#pragma once\n", "")


def _cubins(program: Path, work: Path, pool: Executor) -> dict[int, Path]:
    """Machine code by architecture, of those that nvcc is there for and can make."""
    wanted = os.environ.get("QUERYPATCH_CUDA_ARCHS", ARCHITECTURES)
    if wanted == "off" or not IS_ELF:
        return {}
    if not re.fullmatch(r"\d+(;\d+)*", wanted):
        raise OSError(f'QUERYPATCH_CUDA_ARCHS={wanted} is not like "80;90", nor "off"')
    nvcc = find_nvcc()
    if nvcc is None:
        _say("no nvcc: CUDA kernels will be compiled at first use, by the NVRTC that torch brings")
        return {}

    def cubin(architecture: int) -> Path | None:
        made = work / f"sm_{architecture}.cubin"
        flags = ["-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3"]
        try:
            _run([nvcc, *flags, str(program), "-o", str(made)])
        except (OSError, subprocess.CalledProcessError) as error:
            _warn(f"no CUDA kernels for sm_{architecture} in advance: {_last_line(error)}")
            return None
        return made

    architectures = sorted({int(number) for number in wanted.split(";")})
    made = dict(zip(architectures, pool.map(cubin, architectures), strict=True))
    return {architecture: file for architecture, file in made.items() if file is not None}


def _embedding(program: Path, cubins: dict[int, Path]) -> str:
    """C++ that holds the program's text and the cubins, as embedded.h declares them."""
    if not IS_ELF:
        lines = ['const char* const cuda_program = "";', "const Cubin* const cubins = nullptr;"]
        return _in_namespace([*lines, "const int32_t num_cubins = 0;"], "")
    files = {"program": program, **{f"sm_{number}": file for number, file in cubins.items()}}
    blobs = "".join(_blob(name, file) for name, file in files.items())
    sizes = {number: file.stat().st_size for number, file in cubins.items()}
    rows = [f"{{{number}, querypatch_sm_{number}, {size}}}" for number, size in sizes.items()]
    table = ", ".join([*rows, "{0, nullptr, 0}"])
    lines = [
        "const char* const cuda_program = querypatch_program;",
        f"static const Cubin table[] = {{{table}}};",
        "const Cubin* const cubins = table;",
        f"const int32_t num_cubins = {len(cubins)};",
    ]
    return _in_namespace(lines, blobs)


def _blob(name: str, file: Path) -> str:
    """A file's bytes and a zero behind them, by the assembler: no compiler reads megabytes."""
    symbol = f"querypatch_{name}"
    lines = [".section .rodata", ".balign 16", f".global {symbol}", f".hidden {symbol}"]
    lines += [f"{symbol}:", f'.incbin \\"{file}\\"', ".byte 0", ".previous"]
    assembly = "".join(f'"{line}\\n"' for line in lines)
    return f'extern "C" const char {symbol}[];\nasm({assembly});\n'


def _in_namespace(lines: Iterable[str], before: str) -> str:
    body = "\n".join(lines)
    return f'#include "embedded.h"\n{before}namespace querypatch {{\n{body}\n}}\n'


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _last_line(error: Exception) -> str:
    """Of what the failed program said, its first line with `error` in it; else the exception."""
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    return next((line.strip() for line in said.splitlines() if "error" in line), str(error))


def _say(what: str) -> None:
    sys.stderr.write(f"querypatch: {what}\n")


def _warn(what: str) -> None:
    warnings.warn(f"querypatch: {what}", stacklevel=2)


def _extensions() -> list[Extension]:
    if not CAN_BUILD:
        _warn(f"no operator library for {sys.platform}; plain PyTorch is used")
        return []
    if find_compiler() is None:
        _warn("no C++ compiler ($CXX, g++, clang++): no operator library; plain PyTorch is used")
        return []
    return [Extension("querypatch_ops", sources=[])]


setup(
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
