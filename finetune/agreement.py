"""What a recipe and the weights that it starts from say of a detector, brought together.

What the transformer is made of is the file's, and a recipe that says otherwise is refused. How it
is asked is the recipe's where it says so: a transformer that was pretrained with learned queries is
finetuned with the best proposals of its tokens as queries, with refined boxes, with a share of its
tokens (Deformable DETR, Sparse DETR).
"""

from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from models.artefact import Artefact
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.settings import Settings

ARCHITECTURE = (
    *("hidden_dim", "num_heads", "encoder_layers", "decoder_layers", "feedforward_dim"),
    *("pre_norm", "position", "num_queries", "query_kind"),
    *("position_temperature", "scale_positions", "activation"),
    *("encoder_attention", "decoder_attention", "feature_levels"),
    *("encoder_points", "decoder_points"),
    *("backbone.name", "backbone.dilation", "backbone.stride_in_1x1", "backbone.output"),
)
"""Keys of the detector's settings that must agree, since tensors depend on them."""

CHOICES = (
    *("class_scores", "box_refinement", "two_stage", "proposal_content", "proposal_classes"),
    "num_patterns",
    *("rho", "selection.criterion", "selection.encoder_auxiliary"),
    *("selection.legacy_dam", "selection.legacy_padding"),
)
"""Keys that are the recipe's where it says them, else the file's; all others are the recipe's."""

_ATTENTION = ("encoder_attention", "decoder_attention")
_SECTIONS = ("backbone", "selection")


def resolved_settings(
    settings: DetectorSettings, artefact: Artefact | None, num_classes: int
) -> DetectorSettings:
    """The detector's settings with what opened weights and the number of classes tell of it.

    A key that the recipe leaves out is the file's, or its default without a file. Resolving twice
    changes nothing.

    Raises:
        WeightsError: a key of the recipe differs from the file's or the data's, with both values.
    """
    if settings.num_classes not in (None, num_classes):
        raise WeightsError(
            f"model.num_classes={settings.num_classes}, but the data have {num_classes} classes; "
            "leave model.num_classes out"
        )
    values = {"num_classes": num_classes}
    if artefact is None:
        if settings.backbone.weights is None:
            raise WeightsError(
                "neither init nor model.backbone.weights is given; name the weights to start from, "
                "or say model.backbone.weights=random"
            )
        return settings.model_copy(update=values)
    return _agreed(settings, artefact, values)


def guesses(artefact: Artefact) -> tuple[str, ...]:
    """A sentence for each key that the file cannot tell."""
    told = dict(_leaves(artefact.detector))
    return tuple(
        f"{key}={told[key]}: the file cannot tell; give model.{key} if it is another"
        for key in artefact.guessed
        if key in told
    )


def _agreed(
    settings: DetectorSettings, artefact: Artefact, values: Mapping[str, object]
) -> DetectorSettings:
    given, told = dict(_said(settings)), dict(_leaves(artefact.detector))
    fixed, free = list(ARCHITECTURE), list(CHOICES)
    if given.get("two_stage", told["two_stage"]) or told["two_stage"]:
        # Queries that are made of proposals have no tensors of their own.
        fixed.remove("num_queries")
        free.append("num_queries")
    elif told["decoder_attention"] == "conditional":
        # Points and anchors stand for themselves: some may go, and others be drawn.
        fixed.remove("num_queries")
        free.append("num_queries")
    taken = {key: given.get(key, told[key]) for key in free}
    for key in fixed:
        taken[key] = given[key] if key in artefact.guessed and key in given else told[key]
    conflicts = {key: value for key in fixed if (value := given.get(key, taken[key])) != taken[key]}
    if conflicts:
        raise WeightsError(_refusal(artefact, conflicts, taken))
    sections = {name: settings.model_dump()[name] for name in _SECTIONS}
    model = settings.model_dump()
    for key, value in taken.items():
        section, _, name = key.rpartition(".")
        (sections[section] if section else model)[name] = value
    try:
        return DetectorSettings.model_validate({**model, **values, **sections})
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise WeightsError(f"the recipe with init={artefact.source}: {reason}") from None


def _refusal(
    artefact: Artefact, conflicts: Mapping[str, object], taken: Mapping[str, object]
) -> str:
    differing = "; ".join(
        f"model.{key}={value} in the recipe, {taken[key]} in the file"
        for key, value in conflicts.items()
    )
    if conflicts.get("decoder_attention") == "conditional" or "query_kind" in conflicts:
        return (
            f"init={artefact.source} has other queries or attention, and no part of a decoder "
            f"becomes a conditional one or one with anchors ({differing}); pretrain one of that "
            "kind, or start with from_scratch=true"
        )
    if any(conflicts.get(key) == "deformable" for key in _ATTENTION):
        return (
            f"init={artefact.source} attends densely, as DETR, and no part of such a transformer "
            f"becomes a deformable one ({differing}); pretrain one with deformable attention, or "
            "start with from_scratch=true"
        )
    return (
        f"init={artefact.source} has another architecture: {differing}; "
        "leave these keys out to take the file's"
    )


def _said(settings: DetectorSettings) -> Iterator[tuple[str, object]]:
    """The keys that the recipe gives, with their values."""
    owners: Mapping[str, Settings] = {
        "": settings,
        "backbone": settings.backbone,
        "selection": settings.selection,
    }
    for key, value in _leaves(settings):
        section, _, name = key.rpartition(".")
        if name in owners[section].model_fields_set:
            yield key, value


def _leaves(settings: DetectorSettings) -> Iterator[tuple[str, object]]:
    values = settings.model_dump()
    sections = {name: values.pop(name) for name in _SECTIONS}
    yield from values.items()
    for section, inner in sections.items():
        yield from ((f"{section}.{name}", value) for name, value in inner.items())
