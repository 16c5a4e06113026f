"""Deformable attention on one GPU: is it right, and how fast; everything that needs a GPU, once.

    python -m benchmarks.gpu_session --output DIR

Writes DIR/gpu_session.json after every part, so that a session that ends early leaves what it had:
1. the tests marked `gpu`, and compute-sanitizer on small calls where it is installed;
2. what adding to memory costs by how many numbers an instruction adds, at the cells that a backward
   adds to (benchmarks/additions.cu);
3. seconds of forward and backward: encoder of 800 x 1333 pictures, batch 2; decoder of 300
   queries; float32 and bfloat16; offsets around the module's initial ones, and anywhere in the
   picture. Beside each the share of the time that its bytes take at this GPU's copying rate, the
   plain operator's seconds, and those of an own version of the public algorithm
   (benchmarks/thread_per_channel.cu).

Times are the smallest of 20 replays of a CUDA graph of 10 calls, over 10.
"""

import argparse
import ctypes
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.ops import nvrtc
from models.ops.deformable import fused_deformable_attention
from models.ops.reference import fused_deformable_attention as plain_attention
from models.ops.reference import locations_and_weights

SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
TOKENS = sum(rows * columns for rows, columns in SHAPES)
HEADS, CHANNELS, LEVELS, POINTS, BATCH = 8, 32, 4, 4, 2
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Call:
    """Tensors of one fused call."""

    value: Tensor
    references: Tensor
    offsets: Tensor
    logits: Tensor
    grad_output: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operator takes."""
        return self.value, self.references, self.offsets, self.logits


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

    device: str = ""
    copy_terabytes_per_second: float = 0.0
    checks: dict[str, str] = field(default_factory=dict)
    additions: dict[str, float] = field(default_factory=dict)
    """Billions of float additions a second."""
    timings: list[Timing] = field(default_factory=list)


def main(words: Sequence[str] | None = None) -> int:
    """0 where every check passed, 1 where one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--small", action="store_true", help="small calls only, for a sanitizer")
    parser.add_argument("--without-checks", action="store_true")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("gpu_session: no CUDA device; this is for a machine with a GPU", file=sys.stderr)
        return 2
    if arguments.small:
        run_small_calls()
        return 0
    session = Session(torch.cuda.get_device_name(), copy_rate() / 1e12)
    for part in session_parts(session, arguments.without_checks):
        print(f"gpu_session: {part}", flush=True)
        arguments.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(session), indent=1)
        (arguments.output / "gpu_session.json").write_text(text + "\n", encoding="utf-8")
    return 0 if all(word == "passed" for word in session.checks.values()) else 1


def session_parts(session: Session, without_checks: bool) -> Iterator[str]:
    """Does one part after another, yielding what was found."""
    if not without_checks:
        for name, command in _check_commands().items():
            done = subprocess.run(command, capture_output=True, text=True)
            tail = (done.stdout + done.stderr)[-2000:]
            session.checks[name] = "passed" if done.returncode == 0 else tail
            yield f"{name}: {session.checks[name]}"
    if torch.cuda.get_device_capability() >= (9, 0):  # below, nothing adds several numbers at once
        session.additions = time_additions()
        yield f"billions of additions a second: {session.additions}"
    for queries, place in ((TOKENS, "encoder"), (300, "decoder")):
        for spread in ("initial", "anywhere"):
            for dtype in (torch.float32, torch.bfloat16):
                what = f"{place}, {str(dtype).removeprefix('torch.')}, {spread} offsets"
                for timing in time_call(make_call(queries, dtype, spread), what, session):
                    session.timings.append(timing)
                    yield str(timing)


def _check_commands() -> dict[str, list[str]]:
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/models/ops/test_cuda.py"]
    commands = {"tests": tests}
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS if sanitizer else ():
        small = [sys.executable, "-m", "benchmarks.gpu_session", "--small"]
        commands[tool] = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *small]
    return commands


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


def make_call(queries: int, dtype: torch.dtype, spread: str) -> Call:
    """Queries of the encoder stand at the cells' centres, those of the decoder anywhere."""
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=make, device="cuda")

    if queries == TOKENS:
        centres = torch.cat([_centres(rows, columns) for rows, columns in SHAPES])
        centres = centres.cuda().expand(BATCH, -1, -1)
    else:
        centres = torch.rand((BATCH, queries, 2), generator=make, device="cuda")
    references = centres[:, :, None].expand(-1, -1, LEVELS, -1).contiguous()
    shape = (BATCH, queries, HEADS, LEVELS, POINTS, 2)
    if spread == "initial":
        offsets = _initial_offsets().cuda() + normal(*shape)
    else:
        sizes = torch.tensor([(columns, rows) for rows, columns in SHAPES], device="cuda")
        anywhere = (
            torch.rand(shape, generator=make, device="cuda") - centres[:, :, None, None, None]
        )
        offsets = anywhere * sizes[:, None]
    return Call(
        value=normal(BATCH, TOKENS, HEADS, CHANNELS).to(dtype),
        references=references,
        offsets=offsets.to(dtype),
        logits=normal(*shape[:-1]).to(dtype),
        grad_output=normal(BATCH, queries, HEADS * CHANNELS).to(dtype),
    )


def _centres(rows: int, columns: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([(x + 0.5) / columns, (y + 0.5) / rows], -1).flatten(0, 1)


def _initial_offsets() -> Tensor:
    """Each head looks its own way, 1 to 4 cells far: Deformable DETR, appendix A.4."""
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, POINTS + 1)
    return directions[:, None, None] * steps[:, None].expand(LEVELS, -1, 1)


def time_call(call: Call, what: str, session: Session) -> Iterator[Timing]:
    """Ours, the plain operator, and in float32 the public algorithm's stand-in."""
    rate = session.copy_terabytes_per_second * 1e12

    def timing(kernel: str, seconds: float, moved: int) -> Timing:
        return Timing(what, kernel, seconds * 1e6, moved / rate / seconds)

    forward = [*call.tensors(), call.grad_output]  # the output is as large as its gradient
    moved = sum(t.nbytes for t in forward)
    sums = call.value.numel() * (4 if call.value.dtype == torch.float32 else 4 + 4 + 2)
    moved_back = moved + sums + call.offsets.nbytes + call.logits.nbytes
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

    yield timing("forward", smallest_seconds(ours), moved)
    yield timing("backward", smallest_seconds(lambda: ours_back(False)), moved_back)
    yield timing("backward, deterministic", smallest_seconds(lambda: ours_back(True)), moved_back)
    yield timing("plain forward", smallest_seconds(lambda: _plain(call)), moved)
    if value.dtype == torch.float32:
        stand_in = ThreadPerChannel(call)
        stand_in.check(call)
        yield timing("thread per channel, forward", smallest_seconds(stand_in.forward), moved)
        yield timing(
            "thread per channel, backward", smallest_seconds(stand_in.backward), moved_back
        )


def _plain(call: Call) -> Tensor:
    return plain_attention(call.value, SHAPES, call.references, call.offsets, call.logits)


def smallest_seconds(work: Callable[[], object], calls: int = 10, replays: int = 20) -> float:
    """Of one call of `work`, whatever Python takes around it left out."""
    side = torch.cuda.Stream()
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
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / smallest_seconds(lambda: target.copy_(source))


class Program:
    """Kernels compiled from a file beside this one, launched on torch's current stream."""

    def __init__(self, name: str) -> None:
        source = (Path(__file__).parent / name).read_text(encoding="utf-8")
        major, minor = torch.cuda.get_device_capability()
        cubin = nvrtc.find_nvrtc().compile(source, major * 10 + minor)
        torch.cuda.current_stream().synchronize()  # the device's context is there
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module = ctypes.c_void_p()
        self._check(self.driver.cuModuleLoadData(ctypes.byref(self.module), cubin))

    def launch(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        """`arguments` are ctypes numbers and structures, as the kernel takes them."""
        function = ctypes.c_void_p()
        here = ctypes.byref(function)
        self._check(self.driver.cuModuleGetFunction(here, self.module, name.encode()))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (blocks, 1, 1, threads, 1, 1, 0)
        self._check(self.driver.cuLaunchKernel(function, *sizes, stream, pointers, None))

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"the CUDA driver answered {status}")


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
    program = Program("additions.cu")
    found = {}
    for name in ("one", "two", "four", "eight_bfloats", "one_whole"):
        pointers = (ctypes.c_void_p(sums.data_ptr()), ctypes.c_void_p(rows.data_ptr()))
        count = ctypes.c_longlong(rows.numel())

        def add(name: str = name, arguments: tuple[Any, ...] = (*pointers, count)) -> None:
            program.launch(name, 132 * 16, 128, *arguments)

        found[name] = rows.numel() * 32 / smallest_seconds(add) / 1e9
    return found


class _Level(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("rows", "columns", "start")]


class _Problem(ctypes.Structure):
    """As in thread_per_channel.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("value", "locations", "weights", "grad_output")),
        *((name, ctypes.c_void_p) for name in ("output", "grad_value", "grad_locations")),
        ("grad_weights", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("batch", "tokens", "heads", "channels", "queries")),
        *((name, ctypes.c_int) for name in ("levels", "points")),
        ("level", _Level * LEVELS),
    ]


class ThreadPerChannel:
    """The stand-in for the public algorithm, on a call's locations and weights."""

    def __init__(self, call: Call) -> None:
        self.program = Program("thread_per_channel.cu")
        tensors = call.references, call.offsets, call.logits
        self.locations, self.weights = locations_and_weights(SHAPES, *tensors)
        self.output = torch.empty_like(call.grad_output)
        self.grads = [torch.empty_like(t) for t in (call.value, self.locations, self.weights)]
        given = (call.value, self.locations, self.weights, call.grad_output, self.output)
        queries = call.offsets.shape[1]
        levels, start = [], 0
        for rows, columns in SHAPES:
            levels.append(_Level(rows, columns, start))
            start += rows * columns
        sizes = (BATCH, TOKENS, HEADS, CHANNELS, queries, LEVELS, POINTS)
        pointers = [t.contiguous().data_ptr() for t in (*given, *self.grads)]
        self.problem = _Problem(*pointers, *sizes, (_Level * LEVELS)(*levels))
        self.pairs = BATCH * queries * HEADS

    def forward(self) -> None:
        """Into `output`."""
        blocks = -(-self.pairs * CHANNELS // 1024)
        self.program.launch("forward", blocks, 1024, self.problem)

    def backward(self) -> None:
        """Into `grads`."""
        self.grads[0].zero_()
        self.program.launch("backward", self.pairs, CHANNELS, self.problem)

    def check(self, call: Call) -> None:
        """Both algorithms compute the same, or the comparison would be of nothing."""
        self.forward()
        flat = [size for shape in SHAPES for size in shape]
        ours = torch.ops.querypatch.fused_deformable_attention(
            call.value, flat, call.references, call.offsets, call.logits
        )
        torch.testing.assert_close(self.output, ours, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    raise SystemExit(main())
