"""CUDA kernels compiled at first use, by the NVRTC that comes with torch, and kept on disk.

The library carries its CUDA program as text and asks for the kernels that it lacks: those of
another number of channels, levels or points than were built in, or all of them where it was built
without nvcc. A compilation takes a fraction of a second and no GPU; what it yields is kept under
`~/.cache/querypatch` (`$XDG_CACHE_HOME/querypatch`) by the program, the kernels, the architecture
and the compiler's version, and compiled again where the file is broken or cannot be written.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_LOG = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int32)


class NvrtcError(RuntimeError):
    """There is no NVRTC, or it could not compile; one line."""


def lend_compiler(library: ctypes.CDLL) -> None:
    """Lets the operator library have kernels compiled for the rest of the process."""
    library.querypatch_cuda_program.restype = ctypes.c_char_p
    library.querypatch_cuda_accept.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.querypatch_cuda_refuse.argtypes = [ctypes.c_char_p]
    program = library.querypatch_cuda_program().decode()

    def answer(kernels: bytes, architecture: int) -> None:
        # The caller is C++, which no Python exception reaches: it is told in words.
        try:
            cubin = compiled(program, kernels.decode(), architecture)
        except (NvrtcError, OSError) as error:
            if b"FIXED" in kernels:
                _LOG.warning("slower kernels for any shape replace %s: %s", kernels.decode(), error)
            library.querypatch_cuda_refuse(str(error).encode())
        else:
            library.querypatch_cuda_accept(cubin, len(cubin))

    callback = _Callback(answer)
    _kept.append(callback)
    library.querypatch_cuda_set_compiler(callback)


_kept: list[object] = []
"""What C++ may call must not be collected."""


@cache
def compiled(program: str, kernels: str, architecture: int) -> bytes:
    """Machine code of `kernels` (as the end of cuda_kernels.cu writes them) for e.g. 90, sm_90.

    Taken from the disk where it was compiled before. Raises `NvrtcError`.
    """
    if not program:
        raise NvrtcError(
            "this build of querypatch_ops carries no CUDA program; install one with CUDA kernels"
        )
    nvrtc = find_nvrtc()
    words = (program, kernels, str(architecture), nvrtc.version)
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()
    kept = _cache_file(f"{key}.cubin")
    if kept is not None and (cubin := read_cubin(kept)) is not None:
        return cubin
    cubin = nvrtc.compile(f"#define QUERYPATCH_ONLY {kernels}\n{program}", architecture)
    _LOG.info("compiled %s for sm_%d with NVRTC %s", kernels, architecture, nvrtc.version)
    if kept is not None:
        write_cubin(kept, cubin)
    return cubin


def read_cubin(file: Path) -> bytes | None:
    """None where there is no such file, or not the whole of what was written."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    digest, cubin = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(cubin).digest() == digest:
        return cubin
    _LOG.warning("%s is broken and is compiled again", file)
    return None


def write_cubin(file: Path, cubin: bytes) -> None:
    """Whole or not at all, also where several processes write the same; in vain on a full or
    read-only disk."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}.")
    except OSError as error:
        _LOG.info("compiled kernels are kept in memory only: %s", error)
        return
    written = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(hashlib.sha256(cubin).digest() + cubin)
        written.replace(file)
    except OSError as error:
        written.unlink(missing_ok=True)
        _LOG.info("compiled kernels are kept in memory only: %s", error)


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where there is no home to keep them in."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given:
        return Path(given) / "querypatch"
    try:
        return Path.home() / ".cache" / "querypatch"
    except RuntimeError:  # the user has no home directory
        return None


def _cache_file(name: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / name


@dataclass(frozen=True)
class Nvrtc:
    """A loaded compiler."""

    library: ctypes.CDLL
    version: str
    """Such as "13.0"."""

    def compile(self, source: str, architecture: int) -> bytes:
        """Raises `NvrtcError` with the compiler's first complaint."""
        program = ctypes.c_void_p()
        here = ctypes.byref(program)
        self._check(
            self.library.nvrtcCreateProgram(
                here, source.encode(), b"cuda_kernels.cu", 0, None, None
            )
        )
        try:
            target = f"--gpu-architecture=sm_{architecture}"
            options = (target.encode(), b"-std=c++17", b"-default-device")
            words = (ctypes.c_char_p * len(options))(*options)
            status = self.library.nvrtcCompileProgram(program, len(options), words)
            if status != 0:
                log = self._read("nvrtcGetProgramLog", program).decode(errors="replace")
                raise NvrtcError(
                    f"NVRTC {self.version} cannot compile for sm_{architecture}: "
                    f"{_first_complaint(log) or self._reason(status)}"
                )
            return self._read("nvrtcGetCUBIN", program)
        finally:
            self.library.nvrtcDestroyProgram(here)

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(self.library[f"{what}Size"](program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(self.library[what](program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status != 0:
            raise NvrtcError(f"NVRTC {self.version}: {self._reason(status)}")

    def _reason(self, status: int) -> str:
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        reason: bytes = self.library.nvrtcGetErrorString(status)
        return reason.decode()


@cache
def find_nvrtc() -> Nvrtc:
    """torch's own, else a toolkit's, else what the system's loader knows. Raises `NvrtcError`."""
    for name in [*_installed_files(), *_plain_names()]:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return Nvrtc(library, f"{major.value}.{minor.value}")
    raise NvrtcError(
        f"libnvrtc of CUDA {_cuda_major() or '12 or 13'} is not installed; install torch built for "
        "CUDA or the CUDA toolkit, or set CUDA_HOME to one"
    )


def _installed_files() -> list[str]:
    """Files of libnvrtc in torch's wheels and in toolkits, those of torch's CUDA first."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (nvidia and nvidia.submodule_search_locations) or ()]
    folders = [root / wheel / "lib" for root in roots for wheel in ("cu13", "cuda_nvrtc")]
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders += [Path(toolkit) / "lib64" for toolkit in toolkits if toolkit]
    files = [file for folder in folders for file in sorted(folder.glob("libnvrtc.so.*"))]
    major = _cuda_major()
    return [str(f) for f in files if not major or f.name.split(".so.")[1].split(".")[0] == major]


def _plain_names() -> list[str]:
    major = _cuda_major()
    return [f"libnvrtc.so.{number}" for number in ([major] if major else ["13", "12"])]


def _cuda_major() -> str:
    """Of torch; "" for a torch without CUDA."""
    return (torch.version.cuda or "").partition(".")[0]


def _first_complaint(log: str) -> str:
    lines = [line.strip() for line in log.strip("\0").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "")
