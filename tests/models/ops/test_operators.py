"""The operator among torch's others: traced whole, exported, under autocast, and never misused."""

import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.ops import gather, reference
from models.ops.checks import checked_classic, checked_fused
from models.ops.deformable import deformable_attention, fused_deformable_attention
from models.ops.library import Library, load_library
from tests.models.ops.cases import Sizes, inputs, relative, run

pytestmark = pytest.mark.skipif(
    not isinstance(load_library(), Library), reason="the operator library is not built"
)

CLASSIC = Sizes(levels=2)
FUSED = Sizes(levels=2, coordinates=2)


def flat(sizes: Sizes) -> list[int]:
    return [size for shape in sizes.shapes for size in shape]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("sizes", [CLASSIC, FUSED, Sizes(levels=2, coordinates=4)], ids=str)
def test_torchs_own_check_of_operators_finds_nothing(sizes: Sizes) -> None:
    value, *others = inputs(sizes, dtype=torch.float32)
    name = "fused_deformable_attention" if sizes.coordinates else "deformable_attention"
    forward = getattr(torch.ops.querypatch, name).default
    backward = getattr(torch.ops.querypatch, f"{name}_backward").default
    for tensor in (value, *others):
        tensor.requires_grad_()
    torch.library.opcheck(forward, (value, flat(sizes), *others))
    grad = torch.randn(sizes.batch, sizes.queries, sizes.heads * sizes.channels)
    given = [tensor.detach() for tensor in (value, *others)]
    for needed in (True, False):
        needs = [True, *[needed] * len(others), False]
        torch.library.opcheck(backward, (grad, given[0], flat(sizes), *given[1:], *needs))


def test_compiling_takes_the_operator_whole_and_any_number_of_queries() -> None:
    """In a process of its own, where no shape checks stand in the tracer's way."""
    done = in_process("compare_compiled()")
    assert done.returncode == 0, done.stderr


def compare_compiled() -> None:
    """Without a graph break; for 5 and 9 queries the results are those of the plain call."""

    def attention(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return fused_deformable_attention(value * 2, FUSED.shapes, references, offsets, logits)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries in (5, 9):
        sizes = replace(FUSED, queries=queries)
        given = inputs(sizes, dtype=torch.float32)
        found = run(lambda value, _, *others: compiled(value, *others), sizes, given)
        wanted = run(lambda value, _, *others: attention(value, *others), sizes, given)
        assert all(map(torch.equal, found, wanted))


def test_exporting_keeps_the_operator_as_one_node() -> None:
    class Attention(nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return deformable_attention(value, CLASSIC.shapes, locations, weights)

    given = tuple(inputs(CLASSIC, dtype=torch.float32))
    queries = torch.export.Dim("queries", min=2)
    program = torch.export.export(
        Attention(),
        given,
        dynamic_shapes={"value": None, "locations": {1: queries}, "weights": {1: queries}},
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("querypatch.deformable_attention.default") == 1
    more = inputs(Sizes(levels=2, queries=11), dtype=torch.float32)
    more[0] = given[0]
    torch.testing.assert_close(program.module()(*more), Attention()(*more))


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(coordinates=4, levels=2)], ids=str)
def test_the_form_of_gathers_is_the_plain_operator_forward_and_backward(sizes: Sizes) -> None:
    fused = bool(sizes.coordinates)
    ours = gather.fused_deformable_attention if fused else gather.deformable_attention
    plain = reference.fused_deformable_attention if fused else reference.deformable_attention
    given = inputs(sizes)
    for found, wanted in zip(run(ours, sizes, given), run(plain, sizes, given), strict=True):
        torch.testing.assert_close(found, wanted)


def test_onnxruntime_computes_the_same_for_another_number_of_queries(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Attention(nn.Module):
        def forward(
            self, value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor
        ) -> Tensor:
            return fused_deformable_attention(value, FUSED.shapes, references, offsets, logits)

    names = ("value", "references", "offsets", "logits")
    path = tmp_path / "attention.onnx"
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Attention(),
            tuple(inputs(FUSED, dtype=torch.float32)),
            input_names=names,
            dynamic_shapes={
                name: {0: "batch"} if name == "value" else {0: "batch", 1: "queries"}
                for name in names
            },
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = inputs(Sizes(batch=3, levels=2, coordinates=2, queries=8), dtype=torch.float32)
    (found,) = session.run(
        None, {name: tensor.numpy() for name, tensor in zip(names, more, strict=True)}
    )
    np.testing.assert_allclose(found, Attention()(*more).numpy(), atol=1e-5)


def test_under_autocast_values_are_narrow_and_references_stay_wide() -> None:
    value, references, offsets, logits = inputs(FUSED, dtype=torch.float32)
    wanted = fused_deformable_attention(value, FUSED.shapes, references, offsets, logits)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = value.flatten(2) @ torch.eye(value.shape[2] * value.shape[3])
        found = fused_deformable_attention(
            narrow.view(value.shape), FUSED.shapes, references, offsets, logits
        )
    assert narrow.dtype == found.dtype == torch.bfloat16
    assert relative(found, wanted) < 5e-3


def test_a_second_derivative_is_refused_in_words() -> None:
    given = [tensor.requires_grad_() for tensor in inputs(CLASSIC)]
    out = deformable_attention(given[0], CLASSIC.shapes, *given[1:])
    (of_value,) = torch.autograd.grad(out.square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        of_value.sum().backward()


Change = Callable[[Tensor], Tensor]
WRONG: dict[str, tuple[Sizes, int, Change, str]] = {
    "a value without heads": (CLASSIC, 0, lambda t: t.flatten(2), "value has the shape"),
    "a token too many": (CLASSIC, 0, lambda t: torch.cat((t, t[:, :1]), 1), "value has 42 tokens"),
    "an integer value": (CLASSIC, 0, lambda t: t.int(), "value is"),
    "another batch": (CLASSIC, 1, lambda t: t[:1], "locations has the shape"),
    "places in space": (CLASSIC, 1, lambda t: t.repeat_interleave(2, -1), "locations has the sh"),
    "half a location": (CLASSIC, 1, lambda t: t.half(), "locations is"),
    "a level too few": (CLASSIC, 2, lambda t: t[:, :, :, :1], "weights has the shape"),
    "three coordinates": (FUSED, 1, lambda t: t.repeat(1, 1, 1, 2)[..., :3], "references has 3"),
    "half a reference": (FUSED, 1, lambda t: t.bfloat16(), "references is"),
    "a query too many": (FUSED, 1, lambda t: torch.cat((t, t), 1), "references has the shape"),
    "logits of other heads": (FUSED, 3, lambda t: t[:, :, :2], "logits has the shape"),
}


@pytest.mark.parametrize(("sizes", "place", "change", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_one_line_that_names_it(
    sizes: Sizes, place: int, change: Change, words: str
) -> None:
    """In the words of the public functions, which shape checks would forestall here, and in the
    library's own."""
    given = inputs(sizes, dtype=torch.float32)
    given[place] = change(given[place])
    value, *others = given
    check = checked_fused if sizes.coordinates else checked_classic
    with pytest.raises(ValueError, match=words) as caught:
        check(value, sizes.shapes, *others)
    assert "\n" not in str(caught.value)
    name = "fused_deformable_attention" if sizes.coordinates else "deformable_attention"
    with pytest.raises(RuntimeError, match=f"querypatch: {words}"):
        getattr(torch.ops.querypatch, name)(value, flat(sizes), *others)


def test_tensors_on_two_devices_are_refused_by_name() -> None:
    value, locations, weights = inputs(CLASSIC)
    with pytest.raises(ValueError, match="weights is on meta, value on cpu"):
        deformable_attention(value, CLASSIC.shapes, locations, weights.to("meta"))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([5, 7, 3], "3 numbers"),
        ([-5, -7, 3, 2], "-5 x -7"),
        ([2**40, 2**40, 3, 2], "cells"),
        ([5, 7, 3, 3], "value has 41 tokens"),
    ],
)
def test_the_library_itself_refuses_levels_that_would_lead_it_astray(
    shapes: list[int], words: str
) -> None:
    value, locations, weights = inputs(CLASSIC)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.querypatch.deformable_attention(value, shapes, locations, weights)


def test_a_head_too_large_for_the_kernels_offsets_is_refused_not_wrapped() -> None:
    """2^16 x 2^14 tokens are one number seen 2^30 times; the copy that the kernel needs of them is
    given no memory."""
    done = in_process("attend_to_a_huge_level()")
    assert "2^29 numbers" in done.stderr or "allocate" in done.stderr, done.stderr


def attend_to_a_huge_level() -> None:
    """In a process with 4 GB of address space left."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
    value = torch.zeros(1, 1, 1, 1).expand(1, 2**30, 1, 1)
    where, share = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
    deformable_attention(value, ((2**16, 2**14),), where, share)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa: str, tmp_path: Path) -> None:
    """In a process of its own; compared with this machine's best, the last bits may differ."""
    done = in_process(f"write_results({str(tmp_path / 'found.pt')!r})", QUERYPATCH_CPU_ISA=isa)
    if "cannot run it" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    for sizes, results in zip(_ISA_CASES, found, strict=True):
        attention = fused_deformable_attention if sizes.coordinates else deformable_attention
        wanted = run(attention, sizes, inputs(sizes, dtype=torch.float32))
        for ours, theirs in zip(wanted, results, strict=True):
            assert relative(theirs, ours) < 2e-6


def test_an_instruction_set_nobody_knows_is_refused_in_words() -> None:
    done = in_process("write_results('/dev/null')", QUERYPATCH_CPU_ISA="avx1024")
    assert "QUERYPATCH_CPU_ISA=avx1024 is none of" in done.stderr


_ISA_CASES = (Sizes(channels=32), Sizes(channels=71, coordinates=4), Sizes(queries=99, levels=1))


def in_process(call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a function of this file in a Python of its own, one thread."""
    return subprocess.run(
        [sys.executable, "-c", f"from tests.models.ops import test_operators as t; t.{call}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )


def write_results(path: str) -> None:
    """What `test_every_instruction_set_computes_the_same` runs in another process."""
    results = []
    for sizes in _ISA_CASES:
        attention = fused_deformable_attention if sizes.coordinates else deformable_attention
        results.append(run(attention, sizes, inputs(sizes, dtype=torch.float32)))
    torch.save(results, path)
