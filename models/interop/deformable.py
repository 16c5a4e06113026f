"""Checkpoints with the names of fundamentalvision/Deformable-DETR and kakaobrain/sparse-detr.

Both name a head by every way in which their modules reach it: a shared one once per decoder layer,
those of refinement and of two stages once more inside `transformer` (`models.interop.copies`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.backbone import kind_of
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.copies import repeated_note, without_copies
from models.interop.detr import beyond_others, count_layers
from models.interop.placing import LoadReport, place_tensors
from models.interop.swin import BODY, our_swin_name, swin_constants, swin_name
from models.patch_queries import PatchDetector

NAMES = (
    ("level_embedding", "transformer.level_embed"),
    ("encoder.", "transformer.encoder."),
    ("decoder.", "transformer.decoder."),
    ("queries.", "query_embed."),
    ("reference_points.", "transformer.reference_points."),
    ("proposal_tokens.projection.", "transformer.enc_output."),
    ("proposal_tokens.norm.", "transformer.enc_output_norm."),
    ("proposal_queries.projection.", "transformer.pos_trans."),
    ("proposal_queries.norm.", "transformer.pos_trans_norm."),
    ("scorer.norm.", "transformer.enc_mask_predictor.layer1.0."),
    ("scorer.layers.0.", "transformer.enc_mask_predictor.layer1.1."),
    ("scorer.layers.1.", "transformer.enc_mask_predictor.layer2.0."),
    ("scorer.layers.2.", "transformer.enc_mask_predictor.layer2.2."),
    ("scorer.layers.3.", "transformer.enc_mask_predictor.layer2.4."),
    ("patch_projection.", "patch2query."),
    ("reconstruction.", "feature_align."),
)
"""(Ours, theirs): how a name begins, where that does not depend on the architecture."""

INNER_NAMES = (
    (".self_attention.", ".self_attn."),
    (".cross_attention.", ".cross_attn."),
    (".feedforward.widen.", ".linear1."),
    (".feedforward.narrow.", ".linear2."),
)
"""(Ours, theirs): parts of a transformer layer."""

DECODER_NORMS = ((".norm1.", ".norm2."), (".norm2.", ".norm1."))
"""(Ours, theirs): ours are numbered as they are used, theirs begin with the cross-attention's."""

HEADS = (("class_head.", "class_embed."), ("box_head.", "bbox_embed."))
"""(Ours, theirs): the heads, which their number follows."""

LEFT_OUT = (
    *("*.num_batches_tracked", "*total_params", "*total_ops"),
    *(BODY + "*.relative_position_index", BODY + "*.attn_mask"),
)
"""What has no use here: BatchNorm's counts, what a tool for counting FLOPs leaves behind, a Swin's
constants.
"""

_OUR_BODY = "backbone.body."
_NEEDED = (
    *("transformer.level_embed", "input_proj.0.0.weight"),
    *("class_embed.0.weight", "bbox_embed.0.layers.0.weight"),
    "transformer.decoder.layers.0.linear1.weight",
    "transformer.decoder.layers.0.cross_attn.attention_weights.weight",
)
"""Without these it is nothing of the kind."""

_PRETRAINING_ONLY = ("patch_projection.*", "reconstruction.*")


@dataclass(frozen=True)
class PublicLayout:
    """What the names of an architecture depend on."""

    levels: int
    """Feature levels."""
    decoder_layers: int
    box_refinement: bool
    """Heads of their own for each decoder layer."""
    two_stage: bool
    """A head for proposals after those of the decoder layers."""
    encoder_heads: int
    """Auxiliary heads of encoder layers, after the one for proposals."""
    swin: bool
    """A Swin below them, whose tensors have other names here."""


def layout_of(settings: DetectorSettings) -> PublicLayout:
    """The layout of an architecture.

    Raises:
        WeightsError: the public code has no names for it.
    """
    attention = (settings.encoder_attention, settings.decoder_attention)
    if attention != ("deformable", "deformable"):
        raise WeightsError(
            f"encoder_attention={attention[0]} with decoder_attention={attention[1]} is no public "
            "architecture; export with format querypatch"
        )
    for is_so, what in beyond_others(settings):
        if is_so:
            raise WeightsError(
                f"{what} with deformable attention is no public architecture; export with format "
                "querypatch"
            )
    if kind_of(settings.backbone.name) == "dat":
        raise WeightsError(
            f"backbone.name={settings.backbone.name} is in no public detector of these; export "
            "with format querypatch"
        )
    sparse, chosen = settings.rho is not None, settings.selection
    if sparse and chosen.criterion == "objectness":
        raise WeightsError(
            "selection.criterion=objectness has no public names, its code was never published; "
            "export with format querypatch"
        )
    return PublicLayout(
        levels=settings.feature_levels,
        decoder_layers=settings.decoder_layers,
        box_refinement=settings.box_refinement,
        two_stage=settings.two_stage,
        encoder_heads=max(settings.encoder_layers - 1, 0)
        if sparse and chosen.encoder_auxiliary
        else 0,
        swin=kind_of(settings.backbone.name) == "swin",
    )


def public_names(ours: str, layout: PublicLayout) -> tuple[str, ...]:
    """Every public name of a tensor of ours; first the one that their `named_parameters` gives."""
    bare = ours.removeprefix("detector.")
    if bare.startswith(_OUR_BODY):
        name = bare.removeprefix(_OUR_BODY)
        return (BODY + (swin_name(name) if layout.swin else name),)
    for begin, theirs in _table(layout):
        if bare.startswith(begin):
            rest = _public_part(begin, bare.removeprefix(begin))
            return tuple(public + rest for public in theirs)
    return (bare,)


def our_name(theirs: str, layout: PublicLayout) -> str:
    """The name of a public tensor in a Detector, or beside one; an unknown name stays."""
    if theirs.startswith(BODY):
        name = theirs.removeprefix(BODY)
        return _OUR_BODY + (our_swin_name(name) if layout.swin else name)
    for begin, publics in _table(layout):
        for public in publics:
            if theirs.startswith(public):
                return begin + _our_part(begin, theirs.removeprefix(public))
    return theirs


def is_deformable(tensors: Mapping[str, Tensor]) -> bool:
    """Whether public tensors (`read_tensors`) are of Deformable or Sparse DETR."""
    return "transformer.level_embed" in tensors


def from_deformable(
    tensors: Mapping[str, Tensor], *, source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Public tensors by our names, each once, and the public names that only repeat others.

    Raises:
        WeightsError: tensors that should be copies of each other are not.
    """
    layout = public_layout(tensors, source=source)
    return without_copies(
        tensors, lambda theirs: our_name(theirs, layout), left_out=LEFT_OUT, source=source
    )


def to_deformable_names(
    tensors: Mapping[str, Tensor], settings: DetectorSettings
) -> dict[str, Tensor]:
    """Tensors of ours as the public code names them, every copy written out, float32, on the CPU.

    Raises:
        WeightsError: an architecture that has no public names.
    """
    layout = layout_of(settings)
    exported: dict[str, Tensor] = {}
    if layout.swin:
        constants = swin_constants(settings.backbone)
        exported = {BODY + name: constant for name, constant in constants.items()}
    for ours, tensor in tensors.items():
        at_rest = tensor.detach().float().cpu().clone()
        exported.update(dict.fromkeys(public_names(ours, layout), at_rest))
    return exported


def load_deformable(
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
    named, repeated = from_deformable(tensors, source=source)
    report = place_tensors(
        model,
        named,
        file_name=lambda ours: ours.removeprefix("detector."),
        left_out=(*_PRETRAINING_ONLY, *(name.removeprefix("detector.") for name in new)),
        new=new,
        source=source,
    )
    return replace(report, notes=(*report.notes, *repeated_note(repeated)))


def is_public_swin(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a public detector's backbone is a Swin."""
    return BODY + "patch_embed.proj.weight" in tensors


def public_layout(tensors: Mapping[str, Tensor], *, source: str) -> PublicLayout:
    """The layout that public tensors have.

    Raises:
        WeightsError: they are of something else or cut, or some heads are shared and some are not.
    """
    missing = [name for name in _NEEDED if name not in tensors]
    if missing:
        raise WeightsError(
            f"{source} is no Deformable DETR checkpoint: {', '.join(missing)} missing; "
            "give one of Deformable DETR or Sparse DETR"
        )
    decoder_layers = count_layers(tensors, "transformer.decoder.layers.{}.linear1.weight")
    two_stage = "transformer.pos_trans.weight" in tensors
    heads = max(
        count_layers(tensors, name)
        for name in ("class_embed.{}.weight", "transformer.decoder.class_embed.{}.weight")
    )
    return PublicLayout(
        levels=len(tensors["transformer.level_embed"]),
        decoder_layers=decoder_layers,
        box_refinement=two_stage or _is_refined(tensors, decoder_layers, source),
        two_stage=two_stage,
        encoder_heads=max(heads - decoder_layers - two_stage, 0),
        swin=is_public_swin(tensors),
    )


def _is_refined(tensors: Mapping[str, Tensor], decoder_layers: int, source: str) -> bool:
    """Told by the decoder's own names of the heads; where copies were taken out, by the values."""
    if "transformer.decoder.bbox_embed.0.layers.0.weight" in tensors:
        return True
    names = [f"bbox_embed.{layer}.layers.0.weight" for layer in range(1, decoder_layers)]
    others = [tensors[name] for name in names if name in tensors]
    first = tensors["bbox_embed.0.layers.0.weight"]
    distinct = [not torch.equal(first, other) for other in others]
    if any(distinct) and not all(distinct):
        raise WeightsError(
            f"{source}: some of the box heads bbox_embed.0 to bbox_embed.{decoder_layers - 1} are "
            "copies of each other and some are not; the file is damaged, fetch it again"
        )
    return any(distinct)


def _table(layout: PublicLayout) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(Ours, theirs): how a name begins, the longer ones of theirs first."""
    for head, theirs in HEADS:
        yield from _heads(layout, head, theirs)
    for level in range(layout.levels):
        projection = f"input_projections.{level}"
        yield f"{projection}.convolution.", (f"input_proj.{level}.0.",)
        yield f"{projection}.norm.", (f"input_proj.{level}.1.",)
    for begin, public in NAMES:
        yield begin, (public,)


def _heads(layout: PublicLayout, head: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where a head of ours is in theirs; their decoder holds those that it needs itself."""
    layers = range(layout.decoder_layers)
    in_decoder = layout.two_stage or (layout.box_refinement and theirs == "bbox_embed.")
    decoder = ("transformer.decoder.",) if in_decoder else ()
    if layout.box_refinement:
        for layer in layers:
            yield f"{head}{layer}.", _copies(theirs, layer, decoder)
    else:
        yield head, tuple(f"{theirs}{layer}." for layer in layers)
    number = layout.decoder_layers
    if layout.two_stage:
        yield f"proposal_{head}", _copies(theirs, number, decoder)
        number += 1
    for layer in range(layout.encoder_heads):
        encoder = f"transformer.encoder.{theirs}{layer}."
        yield f"encoder_{head}{layer}.", (encoder, *_copies(theirs, number + layer, decoder))


def _copies(theirs: str, number: int, modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}{theirs}{number}." for module in (*modules, ""))


def _public_part(begin: str, part: str) -> str:
    """What follows `encoder.` or `decoder.`, in their words."""
    if begin == "decoder.":
        part = _swapped_norms(part)
    for ours, theirs in INNER_NAMES:
        part = part.replace(ours, theirs)
    return part


def _our_part(begin: str, part: str) -> str:
    for ours, theirs in INNER_NAMES:
        part = part.replace(theirs, ours)
    return _swapped_norms(part) if begin == "decoder." else part


def _swapped_norms(part: str) -> str:
    for name, other in DECODER_NORMS:
        if name in part:
            return part.replace(name, other)
    return part
