"""`querypatch doctor`: what this installation is, which kernels run, and what is broken.

The kernels are not only found but asked: a few samples and their gradient, against the plain
version of the operator.
"""

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from models.artefact import querypatch_version
from models.ops import reference
from models.ops.deformable import describe
from models.ops.library import Missing, load_library
from models.ops.nvrtc import cache_folder
from models.ops.self_check import sampled_once

State = Literal["well", "slow", "broken", "absent"]
"""Broken: it must be mended. Slow: it works. Absent: an extra that was not installed."""

_NEEDED = (
    *("ray", "webdataset", "torchvision", "numpy", "scipy", "pydantic", "safetensors", "fsspec"),
    *("faster-coco-eval", "simplejpeg", "opencv-python-headless", "matplotlib"),
)
_EXTRAS = ("s3fs", "gcsfs", "onnx", "onnxruntime", "onnxscript")
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    said: str
    """What it is, or what is wrong and the way out."""


def findings() -> tuple[Finding, ...]:
    """Everything that was looked at; devices, kernels and packages of this process."""
    return (*_machine(), *_kernels(), *_packages())


def is_broken(found: tuple[Finding, ...]) -> bool:
    """Whether something must be mended."""
    return any(finding.state == "broken" for finding in found)


def doctor_text(found: tuple[Finding, ...]) -> str:
    """A line for each, what is not well marked; last the verdict."""
    width = max(len(finding.name) for finding in found)
    lines = [
        f"{'' if each.state == 'well' else each.state:7} {each.name:{width}}  {each.said}".rstrip()
        for each in found
    ]
    broken = [each.name for each in found if each.state == "broken"]
    verdict = f"broken: {', '.join(broken)}" if broken else "nothing is broken"
    return "\n".join([*lines, verdict])


def doctor_json(found: tuple[Finding, ...]) -> str:
    """The same for programs."""
    content = {"broken": is_broken(found), "findings": [asdict(each) for each in found]}
    return json.dumps(content, indent=1)


def _machine() -> Iterator[Finding]:
    yield Finding("querypatch", "well", querypatch_version())
    yield Finding("python", "well", f"{platform.python_version()}, {sys.executable}")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding("torch", "well", f"{torch.__version__}, {built}")
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    yield Finding("cpu", "well", f"{capability}, {threads} threads")
    if not torch.cuda.is_available():
        yield Finding("cuda", "absent", "torch sees no GPU")
    for device in _gpus():
        told = torch.cuda.get_device_properties(device)
        memory = f"{told.total_memory / 2**30:.0f} GiB"
        yield Finding(str(device), "well", f"{told.name}, sm_{told.major}{told.minor}, {memory}")


def _kernels() -> Iterator[Finding]:
    for device in (torch.device("cpu"), *_gpus()):
        yield _asked(device)
    kept = cache_folder()
    place = "in memory only: there is no home folder" if kept is None else str(kept)
    yield Finding("kernel cache", "well", place)


def _asked(device: torch.device) -> Finding:
    """Which kernels a device takes, and whether they say what the plain version says."""
    name, said = f"deformable attention on {device}", describe(device)
    try:
        found = sampled_once(device)
    except RuntimeError as error:
        return Finding(name, "broken", str(error))
    wanted = sampled_once(torch.device("cpu"), reference.deformable_attention)
    for ours, theirs in zip(found, wanted, strict=True):
        if not torch.allclose(ours.cpu(), theirs, atol=_TOLERANCE, rtol=0):
            broken = f"{said}: it differs from the plain version; build it anew"
            return Finding(name, "broken", broken)
    return Finding(name, "slow" if isinstance(load_library(), Missing) else "well", said)


def _packages() -> Iterator[Finding]:
    for package in (*_NEEDED, *_EXTRAS):
        try:
            yield Finding(package, "well", version(package))
        except PackageNotFoundError:
            needed = package in _NEEDED
            yield Finding(
                package,
                "broken" if needed else "absent",
                f"not installed; pip install {'querypatch' if needed else package}",
            )


def _gpus() -> tuple[torch.device, ...]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.device("cuda", number) for number in range(count))
