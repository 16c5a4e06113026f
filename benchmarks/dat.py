"""Time of one picture through DAT-T on a CPU, beside the public code and torchvision's Swin-T.

    pip install einops
    git clone https://github.com/LeapLabTHU/DAT && git -C DAT checkout 566a593
    python -m benchmarks.dat --public DAT

The public code is imported from that folder as it is (the state of CVPR 2022), with the weights
that ours has; what it takes from timm, three small functions, is put in its place. Both must give
the same logits before anything is timed. All take turns in one process, so that other load on the
machine falls on all of them; CPU time of all threads and elapsed time, medians. The public code
runs at 224 pixels alone; at other sizes ours stands beside Swin-T.
"""

import argparse
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.backbone import BackboneSettings
from models.classifier import Classifier
from models.interop.classifiers import place_classifier

PUBLIC_SIZE = 224
MOST_DIFFERENCE = 1e-4

Network = Callable[[Tensor], object]

# configs/dat_tiny.yaml of the public code; what is not here is its default.
_PUBLIC_SETTINGS: dict[str, object] = {
    "dim_stem": 96,
    "dims": [96, 192, 384, 768],
    "depths": [2, 2, 6, 2],
    "stage_spec": [["L", "S"], ["L", "S"], ["L", "D"] * 3, ["L", "D"]],
    "heads": [3, 6, 12, 24],
    "window_sizes": [7, 7, 7, 7],
    "groups": [-1, -1, 3, 6],
    "use_pes": [False, False, True, True],
    "strides": [-1, -1, 1, 1],
    "sr_ratios": [-1, -1, -1, -1],
    "offset_range_factor": [-1, -1, 2, 2],
}


@dataclass(frozen=True)
class Times:
    """Medians of one network for one picture, in milliseconds."""

    cpu_ms: float
    """Of all threads."""
    elapsed_ms: float


def main() -> None:
    """Read the arguments, check that the networks agree, print a table for each size."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    ours = _ours()
    public = None if arguments.public is None else _public(arguments.public, ours)
    for height, width in _sizes(arguments.sizes):
        networks: dict[str, Network] = {"ours": ours, "torchvision Swin-T": _swin()}
        if public is not None and (height, width) == (PUBLIC_SIZE, PUBLIC_SIZE):
            networks["public DAT"] = public
        pixels = torch.randn(arguments.batch, 3, height, width)
        _print(_in_turn(networks, pixels, arguments.rounds), arguments.batch, height, width)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--public", type=Path, help="clone of LeapLabTHU/DAT at 566a593")
    parser.add_argument("--batch", type=int, default=1, help="pictures")
    parser.add_argument("--sizes", nargs="+", default=["224x224"], help="HEIGHTxWIDTH, in turn")
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each network")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def _sizes(texts: list[str]) -> list[tuple[int, int]]:
    try:
        return [(int(height), int(width)) for height, width in (t.split("x") for t in texts)]
    except ValueError as error:
        raise SystemExit(f"--sizes {' '.join(texts)}: give HEIGHTxWIDTH, e.g. 224x224") from error


def _ours() -> Classifier:
    settings = BackboneSettings(name="dat_t", weights="random", frozen_precision="float32")
    return Classifier(settings, 1000, torch.Generator().manual_seed(0)).eval()


def _public(folder: Path, ours: Classifier) -> nn.Module:
    """The public network, and its weights in ours; SystemExit where the two then disagree."""
    if not (folder / "models" / "dat.py").is_file():
        raise SystemExit(f"--public {folder} has no models/dat.py; give a clone of LeapLabTHU/DAT")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = _public_class(folder)(**_PUBLIC_SETTINGS).eval()
    place_classifier(ours, network.state_dict(), str(folder), head="file")
    pixels = torch.randn(1, 3, PUBLIC_SIZE, PUBLIC_SIZE)
    with torch.inference_mode():
        difference = float((network(pixels)[0] - ours(pixels)).abs().max())
    print(f"largest difference of the logits of ours and of the public code: {difference:.1e}")
    if difference > MOST_DIFFERENCE:
        raise SystemExit("that is too much for one network; is the clone at 566a593?")
    return network


def _public_class(folder: Path) -> Callable[..., nn.Module]:
    """Its package is called as ours is, so it is imported under a name of its own."""
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath = nn.Identity  # type: ignore[attr-defined]
    layers.to_2tuple = _pair  # type: ignore[attr-defined]
    layers.trunc_normal_ = nn.init.trunc_normal_  # type: ignore[attr-defined]
    sys.modules["timm.models.layers"] = layers
    package = types.ModuleType("public_dat")
    package.__path__ = [str(folder / "models")]
    sys.modules["public_dat"] = package
    try:
        network: Callable[..., nn.Module] = importlib.import_module("public_dat.dat").DAT
    except ModuleNotFoundError as error:
        raise SystemExit(f"the public code needs {error.name}; pip install {error.name}") from error
    return network


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _swin() -> nn.Module:
    network: nn.Module = torchvision.models.swin_t(weights=None).eval()
    return network


@torch.inference_mode()
def _in_turn(networks: dict[str, Network], pixels: Tensor, rounds: int) -> dict[str, Times]:
    """The first round warms up and does not count."""
    cpu: dict[str, list[float]] = {name: [] for name in networks}
    elapsed: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 1):
        for name, network in networks.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            network(pixels)
            cpu[name].append(1000 * (time.process_time() - cpu_began))
            elapsed[name].append(1000 * (time.perf_counter() - began))
    return {
        name: Times(statistics.median(cpu[name][1:]), statistics.median(elapsed[name][1:]))
        for name in networks
    }


def _print(times: dict[str, Times], batch: int, height: int, width: int) -> None:
    print(
        f"\n{batch} x {height}x{width} pixels: ms of CPU time, elapsed, CPU time over that of ours"
    )
    for name, found in times.items():
        ratio = found.cpu_ms / times["ours"].cpu_ms
        print(f"{name:20} {found.cpu_ms:9.1f} {found.elapsed_ms:9.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
