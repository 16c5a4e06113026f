"""Putting a checkpoint's tensors into a module: all of them, or an error that says which misfit.

`strict=False`, as the public code loads, drops what it does not know without a word: a pre-norm
file in a post-norm model loses `transformer.encoder.norm` and nothing is said.
"""

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.interop.checkpoint_files import WeightsError

FATES = ("loaded", "reshaped", "new", "left out")

PARTS = {
    "backbone": ("backbone.",),
    "projection": (
        *("input_projection.", "input_projections."),
        *("learned_positions.", "level_embedding"),
    ),
    "encoder": ("encoder.",),
    "decoder": ("decoder.",),
    "queries": ("queries.", "reference_points.", "patterns."),
    "class head": ("class_head.", "class_embed."),
    "box head": ("box_head.",),
    "proposals": ("proposal_",),
    "selection": ("scorer.", "objectness_"),
    "encoder heads": ("encoder_class_head.", "encoder_box_head."),
    "patch parts": ("patch_projection.", "reconstruction.", "patch2query.", "feature_align."),
    "mask head": ("mask_head.", "attention."),
    "others": ("",),
}
"""Parts of a model, and how the names of their tensors begin; the first that fits counts."""

_SHOWN = 12

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of the model, and of those of the file that were left out."""

    loaded: tuple[str, ...]
    """Model tensors taken from the file, those in `reshaped` included."""
    reshaped: tuple[str, ...]
    """Model tensors whose shape in the file differs by axes of length 1."""
    new: tuple[str, ...]
    """Model tensors that keep their random values."""
    left_out: tuple[str, ...]
    """File tensors that the model has no use for."""
    notes: tuple[str, ...] = ()
    """What else a reader should know, a sentence each."""
    chain: tuple[str, ...] = ()
    """What was read, then what that once began from, and so on."""

    def content(self) -> dict[str, object]:
        """The report by part of the model, for JSON: every name, the notes and the chain."""
        parts = {part: _by_fate(self, part) for part in PARTS}
        return {
            "parts": {
                part: {fate: list(names) for fate, names in fates.items()}
                for part, fates in parts.items()
                if any(fates.values())
            },
            "notes": list(self.notes),
            "chain": list(self.chain),
        }

    def table(self) -> str:
        """The report by part of the model, for people: counts, then the notes."""
        rows: list[tuple[str, ...]] = [("", *FATES)]
        for part in PARTS:
            counts = [len(names) for names in _by_fate(self, part).values()]
            if any(counts):
                rows.append((part, *(str(count or "-") for count in counts)))
        lines = ["  ".join([f"{row[0]:18}", *(f"{cell:>8}" for cell in row[1:])]) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])

    def summary(self) -> str:
        """The report in one line."""
        return (
            f"{len(self.loaded)} tensors loaded ({len(self.reshaped)} reshaped), "
            f"{len(self.new)} new: {listed(self.new)}, "
            f"{len(self.left_out)} left out: {listed(self.left_out)}"
        )


@dataclass(frozen=True)
class FileNames:
    """How a file names the tensors of a backbone."""

    name: Callable[[str], str]
    """From our name to the file's."""
    left_out: tuple[str, ...]
    """Shell patterns of the file's names that may go unused."""
    new: tuple[str, ...]
    """Shell patterns of our names that the file has nothing for."""
    head: str
    """How the names of the classifier's linear layer begin in the file."""
    norm: str | None
    """How those of the norm before it do; None: there is none."""


def place_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    file_name: Callable[[str], str],
    left_out: Sequence[str],
    new: Sequence[str] = (),
    source: str,
) -> LoadReport:
    """Load a module's state from tensors whose names in the file are `file_name(our name)`.

    `left_out` are shell patterns of file names that may go unused, `new` of our names that keep
    their values. One WeightsError lists everything missing, unexpected or of another shape; the
    module is unchanged then.
    """
    state = module.state_dict()
    wanted = {ours: file_name(ours) for ours in state if not _matches(ours, new)}
    missing = [theirs for theirs in wanted.values() if theirs not in tensors]
    spare = [theirs for theirs in tensors if theirs not in wanted.values()]
    unexpected = [theirs for theirs in spare if not _matches(theirs, left_out)]
    misshapen = [
        f"{theirs} {tuple(tensors[theirs].shape)} for {tuple(state[ours].shape)}"
        for ours, theirs in wanted.items()
        if theirs in tensors and not _same_but_for_ones(tensors[theirs].shape, state[ours].shape)
    ]
    complaints = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if complaints:
        raise WeightsError(
            f"{source} does not fit the model: {'; '.join(complaints)}; "
            "give the file's own architecture in the settings, or another file"
        )
    kept = {name: tensor for name, tensor in state.items() if name not in wanted}
    loaded = {ours: tensors[theirs].reshape(state[ours].shape) for ours, theirs in wanted.items()}
    module.load_state_dict(kept | loaded)
    bad = [wanted[ours] for ours, tensor in loaded.items() if not tensor.isfinite().all()]
    if bad:
        logger.warning("%s has values that are not finite in %s", source, listed(bad))
    return LoadReport(
        loaded=tuple(wanted),
        reshaped=tuple(
            ours for ours, theirs in wanted.items() if tensors[theirs].shape != state[ours].shape
        ),
        new=tuple(kept),
        left_out=tuple(spare),
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def part_of(name: str) -> str:
    """The part of a model, one of PARTS, that a tensor is of, by its name in ours."""
    bare = name.removeprefix("detector.")
    return next(part for part, begins in PARTS.items() if bare.startswith(begins))


def _by_fate(report: LoadReport, part: str) -> dict[str, tuple[str, ...]]:
    fates = (report.loaded, report.reshaped, report.new, report.left_out)
    return {
        fate: tuple(name for name in names if part_of(name) == part)
        for fate, names in zip(FATES, fates, strict=True)
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _same_but_for_ones(shape: torch.Size, wanted: torch.Size) -> bool:
    return [length for length in shape if length != 1] == [
        length for length in wanted if length != 1
    ]
