"""Deformable attention on one GPU: is it right, and how fast; everything that needs a GPU, once.

    python -m benchmarks.gpu_session --output DIR [--public CLONE] [--parts PART ...]

Writes DIR/gpu_session.json after every step, so that a session that ends early leaves what it had:
- tests: those marked `gpu`;
- additions: what adding to memory costs by how many numbers an instruction adds, at the cells that
  a backward adds to (benchmarks/additions.cu);
- timings: of forward and backward; encoder of 800 x 1333 pictures, batch 2; decoder of 300 queries;
  float32 and bfloat16; offsets around the module's initial ones, and anywhere in the picture.
  Beside each the share of the time that its bytes take at this GPU's copying rate, the plain
  operator's time, and that of an own version of the public algorithm (thread_per_channel.cu); with
  a clone of fundamentalvision/Deformable-DETR also that of the public kernels themselves;
- sanitizers: compute-sanitizer on small calls, where it is installed.

Times are the smallest of 20 replays of a CUDA graph of 10 calls, over 10.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from benchmarks.gpu_calls import BATCH, HEADS, SHAPES, TOKENS, Call, make_call
from benchmarks.other_kernels import OtherKernels, Program, PublicKernels, ThreadPerChannel, beside
from models.ops.deformable import fused_deformable_attention
from models.ops.reference import fused_deformable_attention as plain_attention
from models.ops.reference import locations_and_weights

Part = Literal["tests", "additions", "timings", "sanitizers"]

TESTS = (
    "tests/models/ops/test_cuda.py",
    "tests/data/test_batches.py",
    "tests/data/test_colour.py",
    "tests/data/test_detection_batches.py",
    "tests/finetune/test_predict.py",
)
SANITIZERS = ("memcheck", "racecheck", "initcheck")
TIME_LIMIT_S = 300


@dataclass(frozen=True)
class Timing:
    """Of one kernel, with what goes with it: conversions, zeros."""

    what: str
    kernel: str
    microseconds: float
    share_of_copy_rate: float
    """Time of the bytes that must be moved, each once, over this time."""


@dataclass
class Session:
    """What was found so far."""

    device: str
    torch: str
    copy_terabytes_per_second: float = 0.0
    checks: dict[str, str] = field(default_factory=dict)
    additions: dict[str, float] = field(default_factory=dict)
    """Billions of float additions a second."""
    timings: list[Timing] = field(default_factory=list)


def main(words: Sequence[str] | None = None) -> int:
    """0 where every check passed, 1 where one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--parts", nargs="+", choices=get_args(Part), default=get_args(Part))
    parser.add_argument("--public", type=Path, help="clone of fundamentalvision/Deformable-DETR")
    parser.add_argument("--small", action="store_true", help="small calls only, for a sanitizer")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("gpu_session: no CUDA device; this is for a machine with a GPU", file=sys.stderr)
        return 2
    if arguments.small:
        run_small_calls()
        return 0
    session = Session(torch.cuda.get_device_name(), torch.__version__)
    for part in arguments.parts:
        for found in _found_by(part, session, arguments.public):
            print(f"gpu_session: {found}", flush=True)
            arguments.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(session), indent=1)
            (arguments.output / "gpu_session.json").write_text(text + "\n", encoding="utf-8")
    return 0 if all(word == "passed" for word in session.checks.values()) else 1


def _found_by(part: Part, session: Session, public: Path | None) -> Iterator[str]:
    """Does one part, yielding what was found, in the session already."""
    match part:
        case "tests":
            tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
            session.checks["tests"] = _outcome(tests, os.environ)
            yield f"tests: {session.checks['tests']}"
        case "additions" if torch.cuda.get_device_capability() >= (9, 0):
            session.additions = time_additions()
            yield f"billions of additions a second: {session.additions}"
        case "additions":
            yield "below sm_90 nothing adds several numbers at once"
        case "timings":
            session.copy_terabytes_per_second = copy_rate() / 1e12
            yield f"copies {session.copy_terabytes_per_second:.2f} TB/s, read and written"
            for timing in time_calls(session, public):
                session.timings.append(timing)
                yield str(timing)
        case "sanitizers":
            session.checks |= sanitized()
            yield ", ".join(f"{tool}: {session.checks[tool]}" for tool in SANITIZERS)


def _outcome(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """ "passed", or the end of what it said."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"took more than {TIME_LIMIT_S} s"
    return "passed" if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]


def sanitized() -> dict[str, str]:
    """What each tool says of the small calls; all at once, as they are slow and the GPU is not.

    Without torch's cache every tensor is an allocation of its own, whose ends are watched.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return dict.fromkeys(SANITIZERS, "compute-sanitizer is not installed")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = [sys.executable, "-m", "benchmarks.gpu_session", "--small"]

    def checked(tool: str) -> str:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *small]
        return _outcome(command, environment)

    with ThreadPoolExecutor() as pool:
        return dict(zip(SANITIZERS, pool.map(checked, SANITIZERS), strict=True))


def run_small_calls() -> None:
    """Every kind of kernel on a few cells: fixed and any shape, deterministic or not."""
    shapes = ((5, 7), (3, 4), (2, 1), (1, 3))
    tokens = sum(rows * columns for rows, columns in shapes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for channels, coordinates, points in ((32, 2, 4), (16, 4, 4), (5, 4, 9)):
            real = torch.float64 if dtype == torch.float64 else torch.float32
            tensors = [
                torch.randn(2, tokens, 3, channels, dtype=dtype, device="cuda"),
                torch.rand(2, 11, 4, coordinates, dtype=real, device="cuda"),
                torch.randn(2, 11, 3, 4, points, 2, dtype=dtype, device="cuda"),
                torch.randn(2, 11, 3, 4, points, dtype=dtype, device="cuda"),
            ]
            for tensor in tensors:
                tensor.requires_grad_()
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                value, *others = tensors
                fused_deformable_attention(value, shapes, *others).sum().backward()
    torch.cuda.synchronize()


def time_calls(session: Session, public: Path | None) -> Iterator[Timing]:
    """Encoder and decoder, both kinds of offsets, both precisions."""
    for queries, place in ((TOKENS, "encoder"), (300, "decoder")):
        for spread in ("initial", "anywhere"):
            for dtype in (torch.float32, torch.bfloat16):
                what = f"{place}, {str(dtype).removeprefix('torch.')}, {spread} offsets"
                call = make_call(queries, dtype, spread)
                yield from time_call(call, what, session.copy_terabytes_per_second * 1e12)
                if dtype == torch.float32:
                    yield from time_others(call, what, session, public)


def time_call(call: Call, what: str, rate: float) -> Iterator[Timing]:
    """Ours and the plain operator; `rate` is that of copying, in bytes a second."""
    forward, backward = _moved(call)
    flat = [size for shape in SHAPES for size in shape]
    operators = torch.ops.querypatch
    value, references, offsets, logits = call.tensors()

    def ours() -> object:
        return operators.fused_deformable_attention(value, flat, references, offsets, logits)

    def ours_back(deterministic: bool) -> object:
        needs = (True, False, True, True, deterministic)
        return operators.fused_deformable_attention_backward(
            call.grad_output, value, flat, references, offsets, logits, *needs
        )

    def plain() -> Tensor:
        return plain_attention(value, SHAPES, references, offsets, logits)

    works: tuple[tuple[str, Callable[[], object], int], ...] = (
        ("forward", ours, forward),
        ("backward", partial(ours_back, False), backward),
        ("backward, deterministic", partial(ours_back, True), backward),
        ("plain forward", plain, forward),
    )
    for kernel, work, moved in works:
        yield _timing(what, kernel, work, moved / rate)
    traced = [t.detach().requires_grad_() for t in (value, offsets, logits)]

    def plain_both() -> object:
        out = plain_attention(traced[0], SHAPES, references, *traced[1:])
        return torch.autograd.grad(out, traced, call.grad_output)

    yield _timing(what, "plain forward and backward", plain_both, (forward + backward) / rate)


def time_others(call: Call, what: str, session: Session, public: Path | None) -> Iterator[Timing]:
    """The kernels that ours is compared with, checked against ours first."""
    forward, backward = (moved / session.copy_terabytes_per_second / 1e12 for moved in _moved(call))
    others: list[OtherKernels] = [ThreadPerChannel(call)]
    if public is not None:
        others.append(PublicKernels(call, public))
    for other in others:
        other.check()
        yield _timing(what, f"{other.name}, forward", other.forward, forward)
        yield _timing(what, f"{other.name}, backward", other.backward, backward)


def _moved(call: Call) -> tuple[int, int]:
    """Bytes that a forward and a backward must move, each once."""
    tensors = [*call.tensors(), call.grad_output]  # the output is as large as its gradient
    forward = sum(t.nbytes for t in tensors)
    sums = call.value.numel() * (4 if call.value.dtype == torch.float32 else 4 + 4 + 2)
    return forward, forward + sums + call.offsets.nbytes + call.logits.nbytes


def _timing(what: str, kernel: str, work: Callable[[], object], least_s: float) -> Timing:
    seconds = smallest_seconds(work)
    return Timing(what, kernel, round(seconds * 1e6, 2), round(least_s / seconds, 3))


def smallest_seconds(work: Callable[[], object], calls: int = 10, replays: int = 20) -> float:
    """Of one call of `work`, whatever Python takes around it left out."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles, and fills the allocator
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return min(times)


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / smallest_seconds(lambda: target.copy_(source))


def time_additions() -> dict[str, float]:
    """At the cells of level 0 to 3 that an encoder's samples touch first."""
    call = make_call(TOKENS, torch.float32, "initial")
    locations, _ = locations_and_weights(SHAPES, call.references, call.offsets, call.logits)
    sizes = torch.tensor([(columns, rows) for rows, columns in SHAPES], device="cuda")
    starts = torch.tensor([0, *(r * c for r, c in SHAPES[:-1])], device="cuda").cumsum(0)
    cells = (locations * sizes[:, None] - 0.5).floor().long()
    cells = cells.clamp(min=0).minimum((sizes - 1)[:, None])
    tokens = cells[..., 1] * sizes[:, :1] + cells[..., 0] + starts[:, None]
    images = torch.arange(BATCH, device="cuda")[:, None, None, None, None]
    heads = torch.arange(HEADS, device="cuda")[:, None, None]
    rows = ((images * TOKENS + tokens) * HEADS + heads).flatten().int()
    sums = torch.zeros(BATCH * TOKENS * HEADS * 32, dtype=torch.int64, device="cuda")
    program = Program(beside("additions.cu"))
    found = {}
    for name in ("one", "two", "four", "eight_bfloats", "one_whole"):
        pointers = (ctypes.c_void_p(sums.data_ptr()), ctypes.c_void_p(rows.data_ptr()))
        count = ctypes.c_longlong(rows.numel())

        def add(name: str = name, arguments: tuple[Any, ...] = (*pointers, count)) -> None:
            program.launch(name, 132 * 16, 128, *arguments)

        found[name] = round(rows.numel() * 32 / smallest_seconds(add) / 1e9, 1)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
