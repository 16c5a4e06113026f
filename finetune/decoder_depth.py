"""`querypatch study decoder-depth`: what each decoder layer finds, and what each part costs.

Every decoder layer of a detector is supervised, so what it would find with its last layers cut off
can be read from one pass over the data. Beside it the parameters and multiply-adds of each part:
whether the decoder is worth learning from a teacher (D3ETR, figure 3) shows in both. A decoder that
was trained with fewer layers may do better than one that was cut.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from data.detection_set import DetectionSet, open_detection_set
from data.evaluation_batches import EvaluationBatch, evaluation_batches
from data.reading import ReadingSettings
from finetune.artefacts import build_detector, open_weights
from finetune.evaluate_weights import classes_of, picture_sizes
from finetune.evaluation import Evaluation, EvaluationSettings, evaluated_ids, score_shares
from finetune.shares import map_classes, predict_layers
from models.artefact import Artefact
from models.detector import Detector
from models.flops import MultiplyAdds, count_flops
from training.recipe import load_recipe


@dataclass(frozen=True)
class AtDepth:
    """What a detector finds with the decoder cut after a layer."""

    layers: int
    """Of the decoder that are left."""
    numbers: Mapping[str, float]
    """Of the evaluation, by name."""
    multiply_adds: int
    """Of the whole detector then."""


@dataclass(frozen=True)
class PartCost:
    """What one part of a detector costs."""

    name: str
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class DecoderDepthStudy:
    """What depth brings, and costs."""

    weights: str
    data: str
    size: tuple[int, int]
    """(height, width) in pixels of the picture whose multiply-adds are counted."""
    depths: tuple[AtDepth, ...]
    parts: tuple[PartCost, ...]

    def content(self) -> dict[str, object]:
        """Everything, as values of JSON."""
        return asdict(self)


def study_decoder_depth(
    source: str,
    data_url: str,
    overrides: Sequence[str],
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> DecoderDepthStudy:
    """The numbers of each decoder layer of the weights in a file, folder or run, in one pass.

    `overrides` are `key=value` of the evaluation; sizes are those of the weights where they are not
    among them; `progress` is told the pictures done and all.

    Raises:
        RecipeError: an override that is none.
        WeightsError, SourceError, ValueError: as `evaluate`.
    """
    settings = load_recipe(EvaluationSettings, {}, overrides)
    artefact = open_weights(source)
    detector = build_detector(artefact).requires_grad_(False)
    data = open_detection_set(data_url)
    settings = settings.model_copy(update={"sizes": picture_sizes(artefact, settings)})
    evaluations, size = _evaluated(detector.to(device), artefact, data, settings, progress)
    spent = count_flops(detector.cpu(), *size)
    of_layer = spent.decoder // detector.settings.decoder_layers
    depths = tuple(
        AtDepth(
            layers=number,
            numbers=evaluation.numbers(),
            multiply_adds=spent.total - of_layer * (len(evaluations) - number),
        )
        for number, evaluation in enumerate(evaluations, start=1)
    )
    return DecoderDepthStudy(artefact.source, data_url, size, depths, _parts(detector, spent))


def draw_decoder_depth(study: DecoderDepthStudy, out: Path) -> None:
    """A PNG with the first number over the depth, and the shares of the parts in the cost."""
    name = next(iter(study.depths[0].numbers))
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 2, 1)
    layers = [depth.layers for depth in study.depths]
    axes.plot(layers, [100 * depth.numbers[name] for depth in study.depths], marker="o")
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("decoder layers that are left", fontsize=8)
    axes.set_xticks(layers)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes = figure.add_subplot(1, 2, 2)
    places = range(len(study.parts))
    for offset, (called, values) in enumerate(
        (
            ("parameters", [part.parameters for part in study.parts]),
            ("multiply-adds", [part.multiply_adds for part in study.parts]),
        )
    ):
        shares = [100 * value / max(1, sum(values)) for value in values]
        bars = axes.barh([place + 0.4 * offset for place in places], shares, 0.38, label=called)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_yticks([place + 0.2 for place in places], [part.name for part in study.parts])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(f"share in percent, at {study.size[0]} x {study.size[1]} pixels", fontsize=10)
    axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _evaluated(
    detector: Detector,
    artefact: Artefact,
    data: DetectionSet,
    settings: EvaluationSettings,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Evaluation], tuple[int, int]]:
    """Of each layer, the first one first; and the size of the first picture."""
    classes, device = classes_of(artefact, data), next(detector.parameters()).device
    ids = evaluated_ids(data.index.num_samples, settings.max_pictures)
    batches = evaluation_batches(
        data,
        ids,
        settings.sizes,
        settings.batch_size,
        settings.processes,
        device,
        ReadingSettings(),
    )
    seen, done = list[tuple[int, int]](), 0
    with closing(batches) as opened:

        def told() -> Iterator[EvaluationBatch]:
            nonlocal done
            for batch in opened:
                if batch.keys:
                    height, width = batch.images.sizes[0].tolist()
                    seen.append((height, width))
                yield batch
                done += len(batch.keys) + len(batch.skipped)
                if progress is not None:
                    progress(done, len(ids))

        shares = predict_layers(
            detector,
            told(),
            classes,
            data.classes,
            settings.max_detections,
            "float32",
            artefact.detector.class_scores,
            range(detector.settings.decoder_layers),
        )
    if not seen:
        raise ValueError(f"{data.url}: no picture could be read")
    class_map = map_classes(classes, data.classes)
    return [score_shares([share], data, class_map, settings) for share in shares], seen[0]


def _parts(detector: Detector, spent: MultiplyAdds) -> tuple[PartCost, ...]:
    heads = (detector.class_head, detector.box_head)
    counted = {
        "backbone": ((detector.backbone,), spent.backbone),
        "encoder": ((detector.encoder,), spent.encoder),
        "decoder": ((detector.decoder,), spent.decoder),
        "heads": (heads, spent.heads),
    }
    parts = [
        PartCost(name, sum(map(_parameters, modules)), multiply_adds)
        for name, (modules, multiply_adds) in counted.items()
    ]
    known = sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts)
    others = PartCost("others", _parameters(detector) - known[0], spent.total - known[1])
    return (*parts, others)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
