"""What a file of weights is, as text: `querypatch weights show FILE`."""

from collections.abc import Iterator

from torch import Tensor

from finetune.artefacts import open_weights
from finetune.model_card import architecture
from models.artefact import Artefact
from models.interop.placing import PARTS, part_of

_FORMS = {
    "querypatch": "querypatch",
    "detr": "the public code's names",
    "hf": "transformers' names",
}
_SHOWN_CLASSES = 12


def weights_report(source: str) -> str:
    """Kind, architecture, classes, origin and the parts with their size and norm, line by line.

    Raises what `open_weights` raises.
    """
    return described(open_weights(source))


def described(artefact: Artefact) -> str:
    """As `weights_report`, of opened weights."""
    told = artefact.provenance
    lines = {
        "source": artefact.source,
        "kind": f"{artefact.kind} ({_FORMS[artefact.form]})",
        "architecture": architecture(artefact),
        "guessed": ", ".join(artefact.guessed),
        "notes": "; ".join(artefact.notes),
        "classes": _classes(artefact),
        "input": f"shorter side {artefact.input.short_side}, at most {artefact.input.max_size}",
        "written by": f"querypatch {told.version}" if told.version else "",
        "run": told.run or "",
        "step": "" if told.step is None else str(told.step),
        "weights": "the moving average" if told.averaged else "",
        "data": told.data or "",
        "began from": " <- ".join(told.init),
        "metrics": ", ".join(f"{name} {value:.4f}" for name, value in told.metrics.items()),
    }
    said = [f"{what:14}{value}" for what, value in lines.items() if value]
    return "\n".join([*said, "", *_parts(artefact)])


def _classes(artefact: Artefact) -> str:
    if artefact.classes is None:
        return "not named"
    pairs = list(zip(artefact.classes.ids, artefact.classes.names, strict=True))
    shown = ", ".join(f"{id} {name}" for id, name in pairs[:_SHOWN_CLASSES])
    return shown + (f", ... {len(pairs)} in all" if len(pairs) > _SHOWN_CLASSES else "")


def _parts(artefact: Artefact) -> Iterator[str]:
    yield f"{'':14}{'tensors':>8}{'numbers':>13}{'norm':>12}"
    for part in PARTS:
        tensors = [t for name, t in artefact.tensors.items() if part_of(name) == part]
        if tensors:
            yield f"{part:14}{_measured(tensors)}"
    yield f"{'all':14}{_measured(list(artefact.tensors.values()))}"


def _measured(tensors: list[Tensor]) -> str:
    numbers = sum(tensor.numel() for tensor in tensors)
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return f"{len(tensors):>8}{numbers:>13,}{squares**0.5:>12.4g}"
