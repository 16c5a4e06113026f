"""Checkpoints with the names of Atten4Vis/ConditionalDETR and IDEA-Research/DAB-DETR, in and out.

The two differ in few names. DAB-DETR's box head is in its files twice, since its decoder moves the
anchors with it. Heads, dilation and the temperature of the positions leave no trace in the tensors;
files of the public code hold the `args` of their run, which say them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from models.backbone import BackboneSettings
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.copies import repeated_note, without_copies
from models.interop.detr import beyond_others, count_layers, resnet_name
from models.interop.placing import LoadReport, place_tensors
from models.patch_queries import PatchDetector
from models.position import TEMPERATURE

_NAMES = (
    ("backbone.body.", ("backbone.0.body.",)),
    ("learned_positions.rows.", ("backbone.1.row_embed.",)),
    ("learned_positions.columns.", ("backbone.1.col_embed.",)),
    ("input_projection.", ("input_proj.",)),
    ("class_head.", ("class_embed.",)),
    ("encoder.position_scale.", ("transformer.encoder.query_scale.",)),
    ("decoder.positions.scale.", ("transformer.decoder.query_scale.",)),
    ("patch_projection.", ("patch2query.",)),
    ("reconstruction.", ("feature_align.",)),
)
_CONDITIONAL = (
    ("queries.", ("query_embed.",)),
    ("reference_points.", ("transformer.decoder.ref_point_head.",)),
    ("box_head.", ("bbox_embed.",)),
)
_ANCHORS = (
    ("queries.", ("refpoint_embed.",)),
    ("patterns.", ("transformer.patterns.",)),
    ("decoder.positions.coder.", ("transformer.decoder.ref_point_head.",)),
    ("decoder.positions.sides.", ("transformer.decoder.ref_anchor_head.",)),
    ("box_head.", ("transformer.decoder.bbox_embed.", "bbox_embed.")),
)
_LAYERS = (
    ("encoder.", ("transformer.encoder.",)),
    ("decoder.", ("transformer.decoder.",)),
)
"""(Ours, theirs): how a name begins; theirs first as `named_parameters` gives it."""

INNER_NAMES = (
    (".self_attention.query_content.", ".sa_qcontent_proj."),
    (".self_attention.query_position.", ".sa_qpos_proj."),
    (".self_attention.key_content.", ".sa_kcontent_proj."),
    (".self_attention.key_position.", ".sa_kpos_proj."),
    (".self_attention.value.", ".sa_v_proj."),
    (".self_attention.", ".self_attn."),
    (".cross_attention.query_content.", ".ca_qcontent_proj."),
    (".cross_attention.query_position.", ".ca_qpos_proj."),
    (".cross_attention.query_sine.", ".ca_qpos_sine_proj."),
    (".cross_attention.key_content.", ".ca_kcontent_proj."),
    (".cross_attention.key_position.", ".ca_kpos_proj."),
    (".cross_attention.value.", ".ca_v_proj."),
    (".cross_attention.", ".cross_attn."),
    (".feedforward.widen.", ".linear1."),
    (".feedforward.narrow.", ".linear2."),
    (".feedforward.activation.", ".activation."),
)
"""(Ours, theirs): parts of a transformer layer, the longer names first."""

_LEFT_OUT = ("*.num_batches_tracked",)
_PRETRAINING_ONLY = ("patch_projection.*", "reconstruction.*")
_LINEAR_IN_NAME = "input_proj.weight"

_SCALE = "transformer.decoder.query_scale."
_MARK = "transformer.decoder.layers.0.sa_qcontent_proj.weight"
_DECODER = "transformer.decoder.layers.{}.linear1.weight"
_ENCODER = "transformer.encoder.layers.{}.linear1.weight"

USUAL_HEADS = 8
ANCHOR_TEMPERATURE = 20.0
"""Of DAB-DETR's published weights but for the plain DC5 ones, which have 10."""


def is_conditional(tensors: Mapping[str, Tensor]) -> bool:
    """Whether public tensors (`read_tensors`) are of Conditional DETR or DAB-DETR."""
    return _MARK in tensors


def public_names(ours: str, *, anchors: bool) -> tuple[str, ...]:
    """Every public name of a tensor of ours; first the one that their `named_parameters` gives."""
    bare = ours.removeprefix("detector.")
    for begin, theirs in _table(anchors):
        if bare.startswith(begin):
            rest = bare.removeprefix(begin)
            if begin in ("encoder.", "decoder."):
                for inner, public in INNER_NAMES:
                    rest = rest.replace(inner, public)
            return tuple(public + rest for public in theirs)
    return (bare,)


def our_name(theirs: str, *, anchors: bool) -> str:
    """The name of a public tensor in a Detector, or beside one; an unknown name stays."""
    for begin, publics in _table(anchors):
        for public in publics:
            if theirs.startswith(public):
                rest = theirs.removeprefix(public)
                if begin in ("encoder.", "decoder."):
                    for inner, part in INNER_NAMES:
                        rest = rest.replace(part, inner)
                return begin + rest
    return theirs


def from_conditional(
    tensors: Mapping[str, Tensor], *, source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Public tensors by our names, each once, and the public names that only repeat others.

    Raises:
        WeightsError: tensors that should be copies of each other are not.
    """
    anchors = _has_anchors(tensors)
    return without_copies(
        tensors,
        lambda theirs: our_name(theirs, anchors=anchors),
        left_out=(*_LEFT_OUT, *_without_use(tensors)),
        source=source,
    )


def to_conditional_names(
    tensors: Mapping[str, Tensor], settings: DetectorSettings
) -> dict[str, Tensor]:
    """Tensors of ours as the public code names them, every copy written out, float32, on the CPU.

    Raises:
        WeightsError: an architecture that has no public names.
    """
    _refuse_nameless(settings)
    exported: dict[str, Tensor] = {}
    for ours, tensor in tensors.items():
        at_rest = tensor.detach().float().cpu().clone()
        names = public_names(ours, anchors=settings.query_kind == "anchor")
        exported.update(dict.fromkeys(names, at_rest))
    exported[_LINEAR_IN_NAME] = exported[_LINEAR_IN_NAME][:, :, None, None]
    return exported


def load_conditional(
    model: Detector | PatchDetector,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    new: Sequence[str] = (),
) -> LoadReport:
    """Fill a model from public tensors (`read_tensors`), strictly.

    `new` are shell patterns of our names that keep their random values. WeightsError lists all
    misfits, and copies that differ.
    """
    named, repeated = from_conditional(tensors, source=source)
    report = place_tensors(
        model,
        named,
        file_name=lambda ours: ours.removeprefix("detector."),
        left_out=(*_PRETRAINING_ONLY, *(name.removeprefix("detector.") for name in new)),
        new=new,
        source=source,
    )
    return replace(report, notes=(*report.notes, *repeated_note(repeated)))


def conditional_settings(
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    arguments: Mapping[str, object] | None = None,
    train_backbone: bool = False,
) -> tuple[DetectorSettings, tuple[str, ...]]:
    """The architecture that public tensors belong to, and the keys of it that are guessed.

    `arguments` is what the file's `args` say, by the public names.

    Raises:
        WeightsError: they are cut, or of a variant that this project does not have.
    """
    anchors, told = _has_anchors(tensors), arguments or {}
    _check_whole(tensors, anchors, source)
    guessed: list[str] = []
    heads, dilation = told.get("nheads"), told.get("dilation")
    if not isinstance(heads, int):
        heads = USUAL_HEADS
        guessed.append("num_heads")
    if not isinstance(dilation, bool):
        dilation = False
        guessed.append("backbone.dilation")
    learned = "backbone.1.row_embed.weight" in tensors
    waves = anchors and not learned
    if waves and not _temperatures(told):
        guessed.append("position_temperature")
    backbone = BackboneSettings(
        name=resnet_name(tensors, source), dilation=dilation, weights=source, train=train_backbone
    )
    queries = tensors["refpoint_embed.weight" if anchors else "query_embed.weight"]
    patterns = tensors.get("transformer.patterns.weight")
    settings = DetectorSettings(
        backbone=backbone,
        hidden_dim=len(tensors["transformer.decoder.norm.weight"]),
        num_heads=heads,
        encoder_layers=count_layers(tensors, _ENCODER),
        decoder_layers=count_layers(tensors, _DECODER),
        feedforward_dim=len(tensors[_DECODER.format(0)]),
        dropout=0.0 if anchors else 0.1,
        decoder_attention="conditional",
        query_kind="anchor" if anchors else "position",
        num_patterns=0 if patterns is None else len(patterns),
        position="learned" if learned else "sine",
        position_temperature=_temperature(told, source) if waves else TEMPERATURE,
        scale_positions="transformer.encoder.query_scale.layers.0.weight" in tensors,
        activation="prelu"
        if "transformer.decoder.layers.0.activation.weight" in tensors
        else "relu",
        class_scores="sigmoid",
        num_queries=len(queries),
        num_classes=len(tensors["class_embed.weight"]),
    )
    return settings, tuple(guessed)


def _table(anchors: bool) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (*_NAMES, *(_ANCHORS if anchors else _CONDITIONAL), *_LAYERS)


def _has_anchors(tensors: Mapping[str, Tensor]) -> bool:
    return "refpoint_embed.weight" in tensors


def _without_use(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A decoder of one layer never scales sines; the public code has the weights all the same."""
    return (f"{_SCALE}*",) if count_layers(tensors, _DECODER) == 1 else ()


def _check_whole(tensors: Mapping[str, Tensor], anchors: bool, source: str) -> None:
    needed = [_DECODER.format(0), "transformer.decoder.norm.weight", "class_embed.weight"]
    if count_layers(tensors, _DECODER) > 1:
        needed.append(f"{_SCALE}layers.0.weight")
    if anchors:
        needed.append("transformer.decoder.ref_anchor_head.layers.0.weight")
    else:
        needed.append("query_embed.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise WeightsError(
            f"{source} is no whole checkpoint of Conditional DETR or DAB-DETR: "
            f"{', '.join(missing)} missing; variants without them are not supported"
        )


def _temperatures(told: Mapping[str, object]) -> list[float]:
    values = [told.get(f"pe_temperature{axis}") for axis in "HW"]
    return [float(value) for value in values if isinstance(value, (int, float))]


def _temperature(told: Mapping[str, object], source: str) -> float:
    found = _temperatures(told) or [ANCHOR_TEMPERATURE]
    if len(set(found)) > 1:
        raise WeightsError(
            f"{source} was trained with pe_temperatureH={found[0]:g} and pe_temperatureW="
            f"{found[1]:g}; here both axes have the same, train it with one"
        )
    return found[0]


def _refuse_nameless(settings: DetectorSettings) -> None:
    """WeightsError for a conditional detector that the public code cannot hold."""
    anchors, beyond = settings.query_kind == "anchor", beyond_others(settings)
    lacking = (
        (settings.encoder_attention == "deformable", "encoder_attention=deformable"),
        (settings.rho is not None, f"rho={settings.rho}"),
        (settings.class_scores == "softmax", "class_scores=softmax"),
        (
            not settings.backbone.name.startswith("resnet"),
            f"backbone.name={settings.backbone.name}",
        ),
        (anchors and not settings.scale_positions, "query_kind=anchor, scale_positions=false"),
        (anchors and settings.activation == "relu", "query_kind=anchor, activation=relu"),
        *((not anchors and is_so, f"query_kind=position, {what}") for is_so, what in beyond),
    )
    for is_so, what in lacking:
        if is_so:
            raise WeightsError(
                f"{what} with decoder_attention=conditional is no public architecture; export with "
                "format querypatch"
            )
