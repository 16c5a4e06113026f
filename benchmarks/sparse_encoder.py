"""Time and memory of a sparse encoder over the share of tokens that it updates (Sparse DETR, 3.2).

    python -m benchmarks.sparse_encoder --height 480 --width 640

Six layers of 256 channels on four levels, with the scoring network before them, as Sparse DETR with
a ResNet-50 has them; the maps of the backbone are random and given. Every setting has the same
weights, and all take turns in one process, so that other load on the machine falls on all of them;
medians. On a CPU the time is CPU time of all threads, the memory that of what autograd keeps for
the backward pass (`saved_tensors_hooks`, each storage once, without parameters): not the peak. On a
GPU the time is elapsed time between CUDA events, and the memory `max_memory_allocated`, less what
lay there before.

The line a + b * rho is fitted to the settings with a selection. What a is made of is measured by
itself: the input projections, the scoring network, and the values, which every layer projects of
all tokens.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from models.backbone import BackboneSettings
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.levels import project_levels
from models.proposals import first_boxes

RHOS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
STRIDES = (8, 16, 32)
CHANNELS = (512, 1024, 2048)

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What a backbone would give for pictures of one size."""

    features: tuple[Tensor, ...]
    padding: Tensor
    tokens: int
    """Of one picture, on four levels."""


@dataclass(frozen=True)
class Cost:
    """Of one setting: medians in milliseconds, and MiB."""

    forward_ms: float
    both_ms: float
    """Forward and backward."""
    memory_mib: float


def main() -> None:
    """Read the arguments, measure every setting in turn, print the tables."""
    arguments = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    detectors = _detectors(device)
    for scale in arguments.scales:
        height, width = round(arguments.height * scale), round(arguments.width * scale)
        inputs = _inputs(arguments.batch, height, width, device)
        losses = {_name(rho): _encoding(one, inputs) for rho, one in detectors.items()}
        losses |= _unshrinking(detectors[RHOS[0]], inputs)
        print(f"{arguments.batch} x {height}x{width} pixels, {device}, {inputs.tokens} tokens each")
        _print(_in_turn(losses, arguments.rounds, device))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="pictures")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=640, help="pixels")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[0.5, 1.0], help="of height and width, in turn"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each setting")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def _detectors(device: torch.device) -> dict[float | None, Detector]:
    """One for each rho, None for no selection, all with the weights of the first."""
    first = Detector(_settings(RHOS[0]), torch.Generator().manual_seed(0)).to(device)
    first.backbone = nn.Identity()
    made: dict[float | None, Detector] = {}
    for rho in (*RHOS, None):
        made[rho] = copy.deepcopy(first).train()
        made[rho].settings = _settings(rho)
        for part in made[rho].modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    return made


def _settings(rho: float | None) -> DetectorSettings:
    """Without heads on the encoder's layers: their cost is the loss's, not the encoder's."""
    return DetectorSettings.model_validate(
        {
            "backbone": BackboneSettings(weights="random"),
            "num_classes": 91,
            "feedforward_dim": 1024,
            "encoder_attention": "deformable",
            "decoder_attention": "deformable",
            "feature_levels": 4,
            "class_scores": "sigmoid",
            "rho": rho,
            "selection": {"encoder_auxiliary": False},
        }
    )


def _inputs(batch: int, height: int, width: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    sides = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    features = tuple(
        torch.randn(batch, channels, *side, generator=generator).to(device)
        for channels, side in zip(CHANNELS, sides, strict=True)
    )
    rows, columns = sides[-1]
    cells = [*sides, (-(-rows // 2), -(-columns // 2))]
    padding = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
    return Inputs(features, padding, sum(rows * columns for rows, columns in cells))


def _name(rho: float | None) -> str:
    return "rho = null" if rho is None else f"rho = {rho}"


def _encoding(detector: Detector, inputs: Inputs) -> Loss:
    """All from the backbone's maps to the memory."""

    def encode() -> Tensor:
        memory = detector.encode_features(inputs.features, inputs.padding)
        total = memory.tokens.square().sum()
        if memory.selection is not None and memory.selection.scores is not None:
            total = total + memory.selection.scores.sum()
        return total

    return encode


def _unshrinking(detector: Detector, inputs: Inputs) -> dict[str, Loss]:
    """What is done for all tokens whatever rho is."""
    memory = detector.encode_features(inputs.features, inputs.padding)
    tokens, padding = memory.tokens.detach().requires_grad_(), memory.padding
    assert detector.input_projections is not None
    assert detector.proposal_tokens is not None
    assert detector.scorer is not None
    levels, scorer, projection = (
        detector.input_projections,
        detector.scorer,
        detector.proposal_tokens,
    )

    def projections() -> Tensor:
        return torch.stack(
            [one.square().sum() for one in project_levels(levels, inputs.features)]
        ).sum()

    def scoring() -> Tensor:
        usable = first_boxes(padding, memory.spatial_shapes).usable
        scores: Tensor = scorer(projection(tokens, usable), padding)
        return scores.sum()

    def values() -> Tensor:
        attentions = (layer.self_attention for layer in detector.encoder.layers)
        return torch.stack([one.project_values(tokens, padding).sum() for one in attentions]).sum()

    return {"input projections": projections, "scoring network": scoring, "values": values}


def _in_turn(losses: dict[str, Loss], rounds: int, device: torch.device) -> dict[str, Cost]:
    """Medians of the measured rounds; one round comes first, unmeasured."""
    forward: dict[str, list[float]] = {name: [] for name in losses}
    both: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(-1, rounds):
        for name, loss in losses.items():
            spent = _milliseconds(torch.no_grad()(loss), device), _step_milliseconds(loss, device)
            if number >= 0:
                forward[name].append(spent[0])
                both[name].append(spent[1])
    return {
        name: Cost(
            statistics.median(forward[name]),
            statistics.median(both[name]),
            _mebibytes(loss, device),
        )
        for name, loss in losses.items()
    }


def _step_milliseconds(loss: Loss, device: torch.device) -> float:
    return _milliseconds(lambda: torch.autograd.backward(loss()), device)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        before = time.process_time()
        run()
        return 1000 * (time.process_time() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))


def _mebibytes(loss: Loss, device: torch.device) -> float:
    """What a step needs beside weights and inputs; on a CPU, what autograd keeps of it."""
    if device.type == "cpu":
        return _kept_bytes(loss) / 2**20
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.autograd.backward(loss())
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _kept_bytes(loss: Loss) -> int:
    """Of all storages that the backward pass will read, without those of the parameters."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # A parameter, or a view of one.
        if not (tensor.is_leaf and tensor.requires_grad) and not _of_parameter(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss()
    counted = sum(storages.values())
    del total
    return counted


def _of_parameter(tensor: Tensor) -> bool:
    """Linear layers keep their weight transposed, a view."""
    base = tensor._base
    return isinstance(base, nn.Parameter)


def _print(costs: dict[str, Cost]) -> None:
    print(f"{'':20} {'forward ms':>12} {'and backward':>14} {'MiB':>9}")
    for name, cost in costs.items():
        # A part alone keeps less than within the encoder, where every layer has tokens of its own.
        memory = f"{cost.memory_mib:9.1f}" if name.startswith("rho") else ""
        print(f"{name:20} {cost.forward_ms:12.1f} {cost.both_ms:14.1f} {memory}")
    sparse = [costs[_name(rho)] for rho in RHOS]
    for what, column in (
        ("forward ms", [cost.forward_ms for cost in sparse]),
        ("forward and backward ms", [cost.both_ms for cost in sparse]),
        ("MiB", [cost.memory_mib for cost in sparse]),
    ):
        slope, start = statistics.linear_regression(RHOS, column)
        fit = statistics.correlation(RHOS, column) ** 2
        print(f"  {what} = {start:.1f} + {slope:.1f} * rho   (R2 {fit:.4f})")


if __name__ == "__main__":
    main()
