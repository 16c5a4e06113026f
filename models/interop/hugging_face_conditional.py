"""Conditional DETR and DAB-DETR of transformers, in: names and configuration.

The names are those of its files. Their DAB-DETR moves anchors closer than 1e-5 to the picture's
edge as if they were that close, ours and the authors' 1e-3. A file's backbone is timm's or
transformers' own ResNet (`models.interop.hugging_face`).
"""

from collections.abc import Mapping

from torch import Tensor

from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.conditional import INNER_NAMES, conditional_settings, public_names
from models.interop.hugging_face import joined_projections, our_backbone_name

_NAMES = (
    ("input_projection.", "model.input_projection."),
    ("encoder.position_scale.", "model.encoder.query_scale."),
    ("encoder.", "model.encoder."),
    ("decoder.norm.", "model.decoder.layernorm."),
    ("decoder.positions.scale.", "model.decoder.query_scale."),
    ("decoder.positions.sides.", "model.decoder.ref_anchor_head."),
    ("patterns.", "model.patterns."),
    ("queries.", "model.query_position_embeddings."),
    ("queries.", "model.query_refpoint_embeddings."),
    ("class_head.", "class_labels_classifier."),
    ("class_head.", "class_embed."),
    ("box_head.", "bbox_predictor."),
)
"""(Ours, theirs): how a name begins, in both models; those of the decoder's layers follow."""

_BODY = "model.backbone.conv_encoder.model."
_LAYERS = "model.decoder.layers."
_POINTS = "model.decoder.ref_point_head."
_ALIAS = "model.decoder.bbox_embed."

_ENCODER_PARTS = (
    (".self_attention.", ".self_attn."),
    (".feedforward.widen.", ".fc1."),
    (".feedforward.narrow.", ".fc2."),
    (".feedforward.activation.", ".activation_fn."),
    (".norm1.", ".self_attn_layer_norm."),
    (".norm2.", ".final_layer_norm."),
)
_CONDITIONAL_PARTS = (
    *((ours, theirs) for ours, theirs in INNER_NAMES if theirs.startswith((".sa_", ".ca_"))),
    (".self_attention.", ".self_attn."),
    (".cross_attention.", ".encoder_attn."),
    (".feedforward.widen.", ".fc1."),
    (".feedforward.narrow.", ".fc2."),
    (".norm1.", ".self_attn_layer_norm."),
    (".norm2.", ".encoder_attn_layer_norm."),
    (".norm3.", ".final_layer_norm."),
)
_ANCHOR_PARTS = (
    (".self_attention.query_content.", ".self_attn.self_attn_query_content_proj."),
    (".self_attention.query_position.", ".self_attn.self_attn_query_pos_proj."),
    (".self_attention.key_content.", ".self_attn.self_attn_key_content_proj."),
    (".self_attention.key_position.", ".self_attn.self_attn_key_pos_proj."),
    (".self_attention.value.", ".self_attn.self_attn_value_proj."),
    (".self_attention.out_proj.", ".self_attn.self_attn.output_proj."),
    (".norm1.", ".self_attn.self_attn_layer_norm."),
    (".cross_attention.query_content.", ".cross_attn.cross_attn_query_content_proj."),
    (".cross_attention.query_position.", ".cross_attn.cross_attn_query_pos_proj."),
    (".cross_attention.query_sine.", ".cross_attn.cross_attn_query_pos_sine_proj."),
    (".cross_attention.key_content.", ".cross_attn.cross_attn_key_content_proj."),
    (".cross_attention.key_position.", ".cross_attn.cross_attn_key_pos_proj."),
    (".cross_attention.value.", ".cross_attn.cross_attn_value_proj."),
    (".cross_attention.out_proj.", ".cross_attn.cross_attn.output_proj."),
    (".norm2.", ".cross_attn.cross_attn_layer_norm."),
    (".feedforward.widen.", ".mlp.fc1."),
    (".feedforward.narrow.", ".mlp.fc2."),
    (".feedforward.activation.", ".mlp.activation_fn."),
    (".norm3.", ".mlp.final_layer_norm."),
)
"""(Ours, theirs): parts of a transformer layer."""


def is_hugging_face_conditional(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors have transformers' names of Conditional DETR or DAB-DETR."""
    return f"{_POINTS}layers.0.weight" in tensors


def from_hugging_face_conditional(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of a Detector, q, k and v joined; unknown names stay.

    Left out: their decoder's copy of the box head, which only older files hold; of a decoder of one
    layer what would scale its sines.
    """
    anchors = _has_anchors(tensors)
    named = {
        _our_name(theirs, anchors): tensor
        for theirs, tensor in tensors.items()
        if not theirs.startswith(_ALIAS)
    }
    if not any(name.startswith("decoder.layers.1.") for name in named):
        named = {n: t for n, t in named.items() if not n.startswith("decoder.positions.scale.")}
    return joined_projections(named)


def hugging_face_conditional_settings(
    named: Mapping[str, Tensor], config: Mapping[str, object], *, source: str
) -> DetectorSettings:
    """The architecture of tensors that have our names already, and of their config.json.

    Raises:
        WeightsError: the configuration asks for what this project's detectors do not do.
    """
    anchors = "decoder.positions.sides.layers.0.weight" in named
    heads = config.get("encoder_attention_heads", 8)
    _refuse_unlike(config, anchors, heads, source)
    backbone = config.get("backbone_config")
    inner = backbone if isinstance(backbone, Mapping) else {}
    told = {
        "nheads": heads,
        "dilation": bool(config.get("dilation")) or inner.get("output_stride") == 16,
        "pe_temperatureH": config.get("temperature_height"),
        "pe_temperatureW": config.get("temperature_width"),
    }
    public = {public_names(ours, anchors=anchors)[0]: tensor for ours, tensor in named.items()}
    settings, _ = conditional_settings(public, source=source, arguments=told)
    in_1x1 = bool(inner.get("downsample_in_bottleneck"))
    return settings.model_copy(
        update={"backbone": settings.backbone.model_copy(update={"stride_in_1x1": in_1x1})}
    )


def _has_anchors(tensors: Mapping[str, Tensor]) -> bool:
    return "model.query_refpoint_embeddings.weight" in tensors


def _our_name(theirs: str, anchors: bool) -> str:
    if theirs.startswith(_BODY):
        return "backbone.body." + our_backbone_name(theirs.removeprefix(_BODY))
    if theirs.startswith(_POINTS):
        begin = "decoder.positions.coder." if anchors else "reference_points."
        return begin + theirs.removeprefix(_POINTS)
    if theirs.startswith(_LAYERS):
        parts = _ANCHOR_PARTS if anchors else _CONDITIONAL_PARTS
        return "decoder.layers." + _replaced(theirs.removeprefix(_LAYERS), parts)
    for begin, public in _NAMES:
        if theirs.startswith(public):
            rest = theirs.removeprefix(public)
            return begin + (_replaced(rest, _ENCODER_PARTS) if begin == "encoder." else rest)
    return theirs


def _replaced(rest: str, parts: tuple[tuple[str, str], ...]) -> str:
    """With the one part that it names in our words."""
    for ours, theirs in parts:
        if theirs in rest:
            return rest.replace(theirs, ours, 1)
    return rest


def _refuse_unlike(config: Mapping[str, object], anchors: bool, heads: object, source: str) -> None:
    usual: dict[str, object] = {
        "activation_function": "prelu" if anchors else "relu",
        "decoder_attention_heads": heads,
        "num_channels": 3,
        "position_embedding_type": "sine",
        "keep_query_pos": False,
        "normalize_before": False,
        "sine_position_embedding_scale": None,
    }
    for key, value in usual.items():
        if config.get(key, value) != value:
            raise WeightsError(
                f"{source}: config.json has {key}={config[key]!r}, this detector needs {value!r}; "
                "give a Conditional DETR or DAB-DETR like the published ones"
            )
