"""CPU seconds of multi-scale deformable attention, beside the form with grid_sample.

    python -m benchmarks.deformable_attention [--rounds 5]

The encoder's self-attention at 800 x 1066 (four levels, 17821 tokens as queries) and the decoder's
cross-attention (300 queries), 8 heads of 32 channels, 4 points, float32, one picture. Both sides
take turns in one process and each counts by its least CPU time of one thread, so that other load on
the machine falls on both. Offsets are those of a fresh module, its directions and one cell of
noise, or, "uniform", anywhere in the picture. The GPU has a script of its own,
`python -m benchmarks.gpu_session`.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops import reference
from models.ops.deformable import deformable_attention, describe, fused_deformable_attention

SHAPES = ((100, 134), (50, 67), (25, 34), (13, 17))
"""Levels of strides 8 to 64 of a picture of 800 x 1066 pixels."""
HEADS, CHANNELS, POINTS = 8, 32, 4
TARGETS = {"forward": 35.0, "fused forward": 30.0, "forward+backward": 25.0}
"""How many times faster than grid_sample the encoder has to be."""
CALLS_A_ROUND = 5
"""Of ours; the other side takes 20 times longer and is called once."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Inputs:
    """Of both operators; the same samples."""

    value: Tensor
    references: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Values, offsets and weights in `dtype`; places stay float32."""
        return Inputs(
            self.value.to(dtype),
            self.references,
            self.offsets.to(dtype),
            self.logits.to(dtype),
            self.locations,
            self.weights.to(dtype),
            self.grad.to(dtype),
        )


@dataclass(frozen=True)
class Row:
    """One line of the table: the same work by grid_sample and by ours."""

    name: str
    plain: Call
    ours: Call


def main() -> None:
    """Read the arguments, take turns, print the table."""
    arguments = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{describe(torch.device('cpu'))}; CPU milliseconds of one thread, least of several")
    draw = torch.Generator().manual_seed(0)
    encoder, decoder = (make_inputs(queries, draw) for queries in (None, 300))
    _print_table([*encoder_rows(encoder), *decoder_rows(decoder)], arguments.rounds)
    _print_narrow(encoder, arguments.rounds)
    _print_threads(encoder, arguments.rounds)


def make_inputs(queries: int | None, draw: torch.Generator) -> Inputs:
    """Of the encoder, whose queries are the cells, or of a decoder with queries anywhere."""
    centres = torch.cat([_centres(rows, columns) for rows, columns in SHAPES])
    tokens = len(centres)
    if queries is not None:
        centres = torch.rand(queries, 2, generator=draw)
    count = len(centres)
    references = centres[None, :, None].expand(1, count, len(SHAPES), 2).contiguous()
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    reach = torch.arange(1, POINTS + 1).view(1, 1, POINTS, 1)
    per_query = (1, count, HEADS, len(SHAPES), POINTS)
    offsets = directions[:, None, None] * reach + torch.randn(*per_query, 2, generator=draw)
    logits = torch.randn(per_query, generator=draw)
    locations, weights = reference.locations_and_weights(SHAPES, references, offsets, logits)
    return Inputs(
        torch.randn(1, tokens, HEADS, CHANNELS, generator=draw),
        references,
        offsets.contiguous(),
        logits,
        locations.contiguous(),
        weights.contiguous(),
        torch.randn(1, count, HEADS * CHANNELS, generator=draw),
    )


def encoder_rows(given: Inputs) -> list[Row]:
    """Forward, fused forward, and with the gradients, at both distributions of samples."""
    uniform = torch.rand(given.locations.shape, generator=torch.Generator().manual_seed(1))
    fused = (given.value, given.references, given.offsets, given.logits)
    rows = [
        Row(
            "fused forward",
            _forward(reference.fused_deformable_attention, fused),
            _forward(fused_deformable_attention, fused),
        ),
        Row(
            "fused forward+backward",
            _both(reference.fused_deformable_attention, fused, given.grad),
            _both(fused_deformable_attention, fused, given.grad),
        ),
    ]
    for name, locations in (("", given.locations), (", uniform", uniform)):
        classic = (given.value, locations, given.weights)
        rows.append(_classic_forward(f"forward{name}", classic))
        rows.append(_classic_both(f"forward+backward{name}", classic, given.grad))
    return rows


def decoder_rows(given: Inputs) -> list[Row]:
    """300 queries."""
    classic = (given.value, given.locations, given.weights)
    return [
        _classic_forward("decoder forward", classic),
        _classic_both("decoder forward+backward", classic, given.grad),
    ]


def _classic_forward(name: str, tensors: Sequence[Tensor]) -> Row:
    plain, ours = reference.deformable_attention, deformable_attention
    return Row(name, _forward(plain, tensors), _forward(ours, tensors))


def _classic_both(name: str, tensors: Sequence[Tensor], grad: Tensor) -> Row:
    plain, ours = reference.deformable_attention, deformable_attention
    return Row(name, _both(plain, tensors, grad), _both(ours, tensors, grad))


def _forward(attention: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Call:
    def call() -> None:
        with torch.no_grad():
            attention(tensors[0], SHAPES, *tensors[1:])

    return call


def _both(attention: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> Call:
    traced = [tensor.detach().clone().requires_grad_() for tensor in tensors]

    def call() -> tuple[Tensor, ...]:
        out = attention(traced[0], SHAPES, *traced[1:])
        return out, *torch.autograd.grad(out, traced, grad)

    return call


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    return parser.parse_args()


def _centres(rows: int, columns: int) -> Tensor:
    """(x, y) of every cell."""
    y, x = torch.meshgrid(
        (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
    )
    return torch.stack((x, y), -1).flatten(0, 1)


def _print_table(rows: Sequence[Row], rounds: int) -> None:
    best = {row.name: [math.inf, math.inf] for row in rows}
    for _ in range(rounds):
        for row in rows:
            kept = best[row.name]
            kept[0] = min(kept[0], _milliseconds(row.plain))
            for _ in range(CALLS_A_ROUND):
                kept[1] = min(kept[1], _milliseconds(row.ours))
    for name, (plain, ours) in best.items():
        wanted = f"  (to reach: {TARGETS[name]:.0f})" if name in TARGETS else ""
        ratio = plain / ours
        print(f"  {name:<26} grid_sample {plain:8.2f}   ours {ours:7.2f}   {ratio:5.1f} x{wanted}")


def _print_narrow(given: Inputs, rounds: int) -> None:
    """bfloat16 beside float32, ours alone: grid_sample reads out of bounds in bfloat16."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        kept = given.to(dtype)
        call = _forward(deformable_attention, (kept.value, kept.locations, kept.weights))
        best[dtype] = min(_milliseconds(call) for _ in range(CALLS_A_ROUND * rounds))
    wide, narrow = best.values()
    print(f"  forward in bfloat16 {narrow:.2f}, {wide / narrow:.2f} times as fast as in float32")


def _print_threads(given: Inputs, rounds: int) -> None:
    """Elapsed time with one and two threads, and whether the bits stay the same."""
    call = _both(deformable_attention, (given.value, given.locations, given.weights), given.grad)
    elapsed, results = {}, []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        elapsed[threads] = min(_elapsed(call) for _ in range(rounds))
        results.append(call())
    torch.set_num_threads(1)
    same = all(all(map(torch.equal, results[0], others)) for others in results[1:])
    print(
        f"  forward+backward elapsed: 1 thread {elapsed[1]:.1f} ms, 2 threads {elapsed[2]:.1f} ms "
        f"({elapsed[1] / elapsed[2]:.2f} x); 1, 2 and 4 threads: "
        f"{'the same bits' if same else 'OTHER BITS'}"
    )


def _milliseconds(call: Call) -> float:
    before = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - before)


def _elapsed(call: Call) -> float:
    before = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - before)


if __name__ == "__main__":
    main()
