"""The tensors of a file as another member of its family has them.

The transformer goes over as it is. The parts that say what it is asked and what it answers may
differ: a detector that refines boxes has heads of its own in every decoder layer, one with
proposals has heads on its tokens and no learned queries, a sparse one a scoring network.

A shared class head serves every layer. A shared box head does too, but for the last matrix of those
that move a box instead of saying one from a point: these begin with "stay", as in Deformable DETR
(A.4); the shared one would say each query's way from its point anew in every layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.detector import Detector
from models.detector_settings import DetectorSettings

CLASS_HEADS = (
    *("class_head.", "proposal_class_head.", "encoder_class_head.", "objectness_class_head."),
)
"""How the names of the tensors with a row per class begin."""

_TOKEN_CLASS_HEADS = CLASS_HEADS[1:]

_OPTIONAL = (
    *("queries.", "reference_points.", "patterns."),
    *("proposal_tokens.", "proposal_queries."),
    *("proposal_class_head.", "proposal_box_head.", "scorer."),
    *("encoder_class_head.", "encoder_box_head."),
    *("objectness_class_head.", "objectness_box_head."),
)
"""Parts that some members of the family have."""

_LAST = "layers.2."
"""The last matrix of a box head."""

_SAID = {
    "queries.": "the learned queries",
    "patterns.": "the patterns",
    "proposal_class_head.": "the heads of the proposals",
    "proposal_queries.": "the projection from proposals to queries",
    "scorer.": "the scoring network",
    "encoder_class_head.": "the heads of the encoder layers",
    "objectness_class_head.": "the heads that score tokens",
}


@dataclass(frozen=True)
class Fitted:
    """What is ready to be filled in; the patterns are those of `finetune.artefacts.fill`."""

    tensors: Mapping[str, Tensor]
    """By our names."""
    new: tuple[str, ...]
    """Our tensors that stay random."""
    left_out: tuple[str, ...]
    """Tensors of the file that go nowhere."""
    notes: tuple[str, ...]


def fitted(
    tensors: Mapping[str, Tensor],
    detector: Detector,
    file: DetectorSettings,
    rows: Mapping[int, int],
) -> Fitted:
    """The tensors of a detector of the settings `file` for `detector`, as far as it takes them.

    `rows` are label -> label of the file, for the classes that both know; without any the class
    heads are new.
    """
    own = {name: tensor.detach() for name, tensor in detector.state_dict().items()}
    ours = detector.settings
    given, new, notes = _box_heads(tensors, ours, file)
    if rows and ours.class_scores == file.class_scores:
        given = _class_heads(given, ours, file)
    else:
        new += ["class_head.*"]
    left_out: list[str] = []
    for part in _OPTIONAL:
        if _starting(own, part) and not _fits(part, given, ours, file):
            new += [f"{part}*"]
            notes += [f"new: {_SAID[part]}"] if part in _SAID else []
        elif not _starting(own, part) and _starting(given, part):
            left_out += [f"{part}*"]
            notes += [f"left out: {_SAID[part]}"] if part in _SAID else []
    given |= _by_rows(own, given, ours, rows, new)
    if ours.num_queries != file.num_queries and "queries.*" not in new:
        counted, note = _by_count(own, given)
        given, notes = given | counted, [*notes, *note]
    spare = (name for name in given if name not in own)
    left_out += [name for name in spare if name.startswith(("box_head.", "class_head."))]
    return Fitted(given, tuple(new), tuple(left_out), tuple(notes))


def class_head_note(ours: DetectorSettings, file: DetectorSettings) -> str | None:
    """Why no row of a class head can go over, whatever the classes."""
    if ours.class_scores == file.class_scores:
        return None
    return f"new, the file has class_scores={file.class_scores}"


def _box_heads(
    tensors: Mapping[str, Tensor], ours: DetectorSettings, file: DetectorSettings
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors with as many box heads as we have, patterns of what is new there, and notes."""
    given = {name: t for name, t in tensors.items() if not name.startswith("box_head.")}
    layers, new, used = range(ours.decoder_layers), list[str](), set[str]()
    for layer in layers if ours.box_refinement else (layers[-1],):
        to = f"box_head.{layer}." if ours.box_refinement else "box_head."
        origin = f"box_head.{layer}." if file.box_refinement else "box_head."
        stays = _moves_a_box(ours, layer) == _moves_a_box(file, layer)
        if not stays:
            new += [f"{to}{_LAST}*"]
        for name in _starting(tensors, origin):
            if stays or not name.startswith(origin + _LAST):
                given[to + name.removeprefix(origin)] = tensors[name]
                used |= {name}
    given |= {name: tensors[name] for name in _starting(tensors, "box_head.") if name not in used}
    if not new:
        return given, new, []
    return given, new, [f"box head: {len(new)} of its last matrices are new: they begin with stay"]


def _moves_a_box(settings: DetectorSettings, layer: int) -> bool:
    """Whether the box head of that decoder layer starts from a box, not from a point or nothing."""
    return settings.box_refinement and (settings.two_stage or layer > 0)


def _class_heads(
    tensors: Mapping[str, Tensor], ours: DetectorSettings, file: DetectorSettings
) -> dict[str, Tensor]:
    """One class head per layer of a shared one, or the last layer's as the shared one."""
    if ours.box_refinement == file.box_refinement:
        return dict(tensors)
    given = dict(tensors)
    last = ours.decoder_layers - 1
    for kind in ("weight", "bias"):
        if not ours.box_refinement:
            given[f"class_head.{kind}"] = tensors[f"class_head.{last}.{kind}"]
            continue
        shared = given.pop(f"class_head.{kind}")
        given |= {f"class_head.{layer}.{kind}": shared for layer in range(last + 1)}
    return given


def _fits(
    part: str, given: Mapping[str, Tensor], ours: DetectorSettings, file: DetectorSettings
) -> bool:
    """Whether the file has the part, and it means the same there."""
    if not _starting(given, part):
        return False
    if part == "patterns.":
        return ours.num_patterns == file.num_patterns
    if part == "proposal_queries.":
        return ours.proposal_content == file.proposal_content
    if part in _TOKEN_CLASS_HEADS:
        same = ours.proposal_classes == file.proposal_classes
        return same and ours.class_scores == file.class_scores
    return True


def _by_rows(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    ours: DetectorSettings,
    rows: Mapping[int, int],
    new: Iterable[str],
) -> dict[str, Tensor]:
    """The class heads that are not new, with random rows but for those of known classes.

    Heads on tokens that only tell objects from the rest say so in row 0, whatever the classes; all
    rows go over where there are as many.
    """
    taken: dict[str, Tensor] = {}
    for part in CLASS_HEADS:
        if f"{part}*" in new:
            continue
        tells_objects = part in _TOKEN_CLASS_HEADS and ours.proposal_classes == "binary"
        for name in _starting(own, part):
            if tells_objects and given[name].shape == own[name].shape:
                taken[name] = given[name]
                continue
            chosen = {0: 0} if tells_objects else rows
            taken[name] = _rows(own[name], given[name], chosen, ours.class_scores == "softmax")
    return taken


def _by_count(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The learned queries where the file has more, or fewer and the rest stay random."""
    name = "queries.weight"
    if name not in own or name not in given:
        return {}, []
    taken, known = own[name].clone(), min(len(own[name]), len(given[name]))
    taken[:known] = given[name][:known].to(taken.dtype)
    note = f"queries: the first {known} of the file's {len(given[name])}"
    more = len(taken) - known
    return {name: taken}, [f"{note}, {more} new ones" if more else note]


def _rows(own: Tensor, given: Tensor, rows: Mapping[int, int], no_object: bool) -> Tensor:
    """The known rows in their places, and the last one, "no object", where there is one."""
    taken = own.clone()
    if rows:
        taken[list(rows)] = given[list(rows.values())].to(own.dtype)
        if no_object:
            taken[-1] = given[-1].to(own.dtype)
    return taken


def _starting(tensors: Mapping[str, Tensor], part: str) -> list[str]:
    return [name for name in tensors if name.startswith(part)]
