"""`querypatch study keep-ratio`: what a sparse detector finds, and what it costs, over rho.

One set of weights serves every share of the tokens (Sparse DETR, section 4.3). For each rho: the
numbers of the evaluation, Corr, seconds a picture (the median over a few, one at a time) and
multiply-adds, each also of the encoder, the only part that rho changes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data.detection_set import DetectionSet, open_detection_set
from data.evaluation_batches import evaluation_batches
from data.reading import ReadingSettings
from finetune.artefacts import build_detector, open_weights
from finetune.evaluate_weights import judged_boxes, picture_sizes
from finetune.evaluation import EvaluationSettings, evaluated_ids
from finetune.use_overrides import used_with
from models.artefact import Artefact
from models.detector import Detector
from models.flops import count_flops
from models.structures import Images
from training.recipe import RecipeError, load_recipe

SHARES = tuple(number / 10 for number in range(1, 11))
"""The keep ratios of the paper's figures, and 1."""

CORR = "corr_mask_attn_map_dec_all"
_TIMED_PICTURES = 4
_REPEATS = 3
_COLOURS = ("tab:blue", "tab:orange")


@dataclass(frozen=True)
class Cost:
    """What one picture costs."""

    seconds: float
    encoder_seconds: float
    multiply_adds: int
    encoder_multiply_adds: int


@dataclass(frozen=True)
class AtRho:
    """What a detector finds, and costs, with one keep ratio."""

    rho: float
    numbers: Mapping[str, float]
    """Of the evaluation, by name."""
    corr: float | None
    """Share of the decoder's attention that meets updated tokens."""
    cost: Cost


@dataclass(frozen=True)
class KeepRatioStudy:
    """The sweep."""

    weights: str
    data: str
    trained_with: float | None
    """The rho of the training."""
    device: str
    timed_sizes: tuple[tuple[int, int], ...]
    """(height, width) of the pictures that were timed; multiply-adds are those of the first."""
    points: tuple[AtRho, ...]

    def content(self) -> dict[str, object]:
        """Everything, as values of JSON."""
        return asdict(self)


def study_keep_ratio(
    source: str,
    data_url: str,
    overrides: Sequence[str],
    device: torch.device,
    shares: Sequence[float] = SHARES,
    progress: Callable[[int, int], None] | None = None,
) -> KeepRatioStudy:
    """The sweep of the weights in a file, folder or run over the labelled set at `data_url`.

    `overrides` are `key=value` of the evaluation; sizes are those of the weights where they are not
    among them; `progress` is told the keep ratios done and all.

    Raises:
        RecipeError: an override that is none, weights that do not choose tokens, no keep ratio.
        WeightsError, SourceError, ValueError: as `evaluate`.
    """
    if not shares:
        raise RecipeError("no keep ratio to study: give one or more, e.g. --rho 0.1 --rho 0.5")
    settings = load_recipe(EvaluationSettings, {}, overrides)
    artefact = open_weights(source)
    variants = [used_with(artefact, [f"model.rho={share}"]) for share in shares]
    data = open_detection_set(data_url)
    settings = settings.model_copy(update={"sizes": picture_sizes(artefact, settings)})
    pictures = _timed_pictures(data, settings, device)
    if not pictures:
        raise ValueError(f"{data_url}: no picture to measure time on could be read")
    points = []
    for variant in variants:
        points.append(_at_rho(variant, data, settings, pictures, device))
        if progress is not None:
            progress(len(points), len(variants))
    return KeepRatioStudy(
        weights=artefact.source,
        data=data_url,
        trained_with=artefact.detector.rho,
        device=device.type,
        timed_sizes=tuple(_size(images) for images in pictures),
        points=tuple(points),
    )


def draw_keep_ratio(study: KeepRatioStudy, out: Path) -> None:
    """A PNG with a panel of the first number, one of seconds and one of multiply-adds, over rho."""
    rho = [point.rho for point in study.points]
    name = next(iter(study.points[0].numbers))
    costs = [point.cost for point in study.points]
    panels: tuple[tuple[str, dict[str, list[float]]], ...] = (
        (name, {"": [100 * point.numbers[name] for point in study.points]}),
        (
            f"milliseconds a picture, {study.device}",
            {
                "whole": [1000 * cost.seconds for cost in costs],
                "encoder": [1000 * cost.encoder_seconds for cost in costs],
            },
        ),
        (
            "GFLOPs (multiply-adds) a picture",
            {
                "whole": [cost.multiply_adds / 1e9 for cost in costs],
                "encoder": [cost.encoder_multiply_adds / 1e9 for cost in costs],
            },
        ),
    )
    figure = Figure(figsize=(12.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for colour, (called, values) in zip(_COLOURS, curves.items(), strict=False):
            axes.plot(rho, values, marker=".", color=colour, label=called)
        if study.trained_with is not None:
            axes.axvline(study.trained_with, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("rho (dotted: trained with)", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _at_rho(
    artefact: Artefact,
    data: DetectionSet,
    settings: EvaluationSettings,
    pictures: Sequence[Images],
    device: torch.device,
) -> AtRho:
    assert artefact.detector.rho is not None
    evaluation = judged_boxes(artefact, data, settings, device)
    detector = build_detector(artefact).requires_grad_(False).to(device)
    counted = count_flops(detector, *_size(pictures[0]))
    whole, encoder = _timed(detector, pictures)
    return AtRho(
        rho=artefact.detector.rho,
        numbers=evaluation.numbers(),
        corr=evaluation.selection.get(CORR),
        cost=Cost(whole, encoder, counted.total, counted.encoder),
    )


def _timed_pictures(
    data: DetectionSet, settings: EvaluationSettings, device: torch.device
) -> list[Images]:
    """A few pictures, each alone and at its size of the evaluation."""
    ids = evaluated_ids(data.index.num_samples, _TIMED_PICTURES)
    batches = evaluation_batches(data, ids, settings.sizes, 1, 0, device, ReadingSettings())
    with closing(batches) as opened:
        return [batch.images for batch in opened if batch.keys]


@torch.inference_mode()
def _timed(detector: Detector, pictures: Sequence[Images]) -> tuple[float, float]:
    """Seconds a picture of the whole detector and of its encoder, medians over all runs."""
    spent = list[float]()
    with _clocked(detector.encoder, spent):
        for images in pictures:
            detector(images)
        spent.clear()
        whole = list[float]()
        for images in [*pictures] * _REPEATS:
            started = _now(images.pixels.device)
            detector(images)
            whole.append(_now(images.pixels.device) - started)
    return median(whole), median(spent)


@contextmanager
def _clocked(part: torch.nn.Module, spent: list[float]) -> Iterator[None]:
    """Adds the seconds of each call of the module to `spent`."""
    device, started = next(part.parameters()).device, list[float]()

    def before(*_: object) -> None:
        started.append(_now(device))

    def after(*_: object) -> None:
        spent.append(_now(device) - started.pop())

    handles = (part.register_forward_pre_hook(before), part.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size(images: Images) -> tuple[int, int]:
    return images.pixels.shape[2], images.pixels.shape[3]
