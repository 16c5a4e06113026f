"""Conditional DETR and DAB-DETR beside those of transformers: same weights, pictures and process.

    python -m benchmarks.conditional [--kind conditional|dab] [--height 480] [--width 640]

Random weights of a ResNet-50 detector with 300 queries, as transformers makes and saves them, are
read by our import. Prints the largest difference of their boxes, the times of a forward pass in
evaluation and of one forward and backward pass of the transformer in training (the CNN frozen, the
loss a sum), each the best of several, and the ratio. float32, dropout 0, threads as torch takes
them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from models.detector import Detector
from models.interop.checkpoint_files import read_tensors
from models.interop.recognise import recognise
from models.structures import Images, padding_of

_BACKBONE = {"depths": [3, 4, 6, 3], "layer_type": "bottleneck", "out_features": ["stage4"]}


def main() -> None:
    """Reads the arguments, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("conditional", "dab"), default="conditional")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    theirs = their_model(arguments.kind)
    ours = our_model(theirs)
    sizes = torch.tensor([[arguments.height, arguments.width]] * 2)
    pixels = torch.randn(2, 3, arguments.height, arguments.width)
    images = Images(pixels, padding_of(sizes, arguments.height, arguments.width), sizes)
    with torch.no_grad():
        boxes = ours(images).groups[0].layers[-1].boxes
        difference = (boxes - _their_boxes(theirs, images)).abs().max()
    print(f"{arguments.kind}: boxes differ by {difference:.1e} at most")
    with torch.no_grad():
        times = [
            best_of(arguments.repeats, lambda: ours(images)),
            best_of(arguments.repeats, lambda: _their_boxes(theirs, images)),
        ]
    _print("forward", times)
    ours.train()
    theirs.train()
    theirs.model.backbone.requires_grad_(False)
    times = [
        best_of(arguments.repeats, lambda: _step_of_ours(ours, images)),
        best_of(arguments.repeats, lambda: _step_of_theirs(theirs, images)),
    ]
    _print("forward and backward", times)


def their_model(kind: str) -> transformers.PreTrainedModel:
    """Of transformers, with every weight of the transformer off its first value."""
    backbone = transformers.ResNetConfig(**_BACKBONE)
    told = {"backbone_config": backbone, "dropout": 0.0}
    if kind == "dab":
        made = transformers.DabDetrForObjectDetection(transformers.DabDetrConfig(**told))
    else:
        config = transformers.ConditionalDetrConfig(**told)
        made = transformers.ConditionalDetrForObjectDetection(config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "backbone" not in name:
                weight.add_(0.02 * torch.randn(weight.shape))
    return made.eval()


def our_model(theirs: transformers.PreTrainedModel) -> Detector:
    """The same detector, read from what transformers saves of it."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        tensors = read_tensors(f"{folder}/model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text())
    found = recognise(tensors, {}, "transformers", config=config)
    backbone = found.detector.backbone.model_copy(update={"frozen_precision": "float32"})
    told = found.detector.model_copy(update={"dropout": 0.0, "backbone": backbone})
    built = Detector(told, torch.Generator()).eval()
    state = built.state_dict()
    built.load_state_dict({n: t.reshape(state[n].shape) for n, t in found.tensors.items()})
    return built


def best_of(repeats: int, run: Callable[[], object]) -> float:
    """Milliseconds of the fastest of several runs, after one that does not count."""
    run()
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        spent.append(time.perf_counter() - begin)
    return min(spent) * 1000


def _their_boxes(model: transformers.PreTrainedModel, images: Images) -> Tensor:
    boxes: Tensor = model(images.pixels, pixel_mask=(~images.padding).long()).pred_boxes
    return boxes


def _step_of_ours(model: Detector, images: Images) -> None:
    last = model(images).groups[0].layers[-1]
    torch.autograd.backward(last.boxes.sum() + last.logits.sum())


def _step_of_theirs(model: transformers.PreTrainedModel, images: Images) -> None:
    said = model(images.pixels, pixel_mask=(~images.padding).long())
    torch.autograd.backward(said.pred_boxes.sum() + said.logits.sum())


def _print(what: str, times: list[float]) -> None:
    ours, theirs = times
    print(f"{what}: ours {ours:.0f} ms, transformers {theirs:.0f} ms, {theirs / ours:.2f} times")


if __name__ == "__main__":
    main()
