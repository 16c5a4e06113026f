"""`DetrForObjectDetection` of transformers, in and out: names, configuration, classes.

The names are those of its files (transformers 5 renames some while it loads). The backbone of a
file is timm's, whose names are torchvision's, or transformers' own ResNet, which we write: it needs
neither timm nor a network. That one has no dilation, and their transformer has no pre-norm.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from models.backbone import is_resnet
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.class_names import distinct_names
from models.interop.detr import beyond_others, detr_name, detr_settings
from models.resnet import resnet_layout, stage_channels
from models.structures import Classes

NAMES = (
    ("backbone.body.", "model.backbone.conv_encoder.model."),
    ("learned_positions.rows.", "model.position_embedding.row_embeddings."),
    ("learned_positions.columns.", "model.position_embedding.column_embeddings."),
    ("input_projection.", "model.input_projection."),
    ("encoder.", "model.encoder."),
    ("decoder.norm.", "model.decoder.layernorm."),
    ("decoder.", "model.decoder."),
    ("queries.", "model.query_position_embeddings."),
    ("class_head.", "class_labels_classifier."),
    ("box_head.", "bbox_predictor."),
)
"""(Ours, theirs): how a name begins."""

_OLD_POSITIONS = "model.backbone.position_embedding."

ENCODER_NAMES = (("norm1", "self_attn_layer_norm"), ("norm2", "final_layer_norm"))
DECODER_NAMES = (
    ("norm1", "self_attn_layer_norm"),
    ("norm2", "encoder_attn_layer_norm"),
    ("norm3", "final_layer_norm"),
)
INNER_NAMES = (
    ("self_attention", "self_attn"),
    ("cross_attention", "encoder_attn"),
    ("feedforward.widen", "fc1"),
    ("feedforward.narrow", "fc2"),
)
"""(Ours, theirs): parts of a transformer layer."""

_OUR_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)")
_THEIR_BLOCK = re.compile(
    r"encoder\.stages\.(\d)\.layers\.(\d+)\.(layer\.(\d)|shortcut)\.(convolution|normalization)"
)
_THEIR_STEM = "embedder.embedder."

_PROJECTIONS = ("q", "k", "v")


def is_hugging_face(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors have the names of DetrForObjectDetection."""
    return "model.query_position_embeddings.weight" in tensors


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of a Detector, q, k and v joined; unknown names stay."""
    named = {_our_name(theirs): tensor for theirs, tensor in tensors.items()}
    return joined_projections(named)


def joined_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With q, k and v of each attention as one matrix, and the rest as it is."""
    named = dict(tensors)
    split = [name for name in named if ".q_proj." in name]
    for name in split:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in _PROJECTIONS]
        if all(part in named for part in parts):
            joint = torch.cat([named.pop(part) for part in parts])
            named[name.replace(".q_proj.", ".in_proj_")] = joint
    return named


def to_hugging_face(tensors: Mapping[str, Tensor], hidden_dim: int) -> dict[str, Tensor]:
    """A Detector's tensors as files of transformers name and shape them, float32, on the CPU."""
    exported: dict[str, Tensor] = {}
    for ours, tensor in tensors.items():
        at_rest = tensor.detach().float().cpu()
        if ".in_proj_" in ours:
            for part, rows in zip(_PROJECTIONS, torch.split(at_rest, hidden_dim), strict=True):
                name = _their_name(ours.replace(".in_proj_", f".{part}_proj."))
                exported[name] = rows.clone()
        else:
            exported[_their_name(ours)] = at_rest.clone()
    projection = _their_name("input_projection.weight")
    exported[projection] = exported[projection].reshape(hidden_dim, -1, 1, 1)
    return exported


def hugging_face_settings(
    named: Mapping[str, Tensor], config: Mapping[str, object], *, source: str
) -> DetectorSettings:
    """The architecture of tensors that have our names already, and of their config.json.

    Raises:
        WeightsError: the configuration asks for what this project's DETR does not do.
    """
    heads = config.get("encoder_attention_heads", 8)
    _refuse_unlike(config, heads, source)
    backbone = config.get("backbone_config")
    inner = backbone if isinstance(backbone, Mapping) else {}
    public = {detr_name(ours): tensor for ours, tensor in named.items()}
    settings = detr_settings(
        public,
        source=source,
        num_heads=heads if isinstance(heads, int) else 8,
        dilation=bool(config.get("dilation")) or inner.get("output_stride") == 16,
    )
    in_1x1 = bool(inner.get("downsample_in_bottleneck"))
    return settings.model_copy(
        update={"backbone": settings.backbone.model_copy(update={"stride_in_1x1": in_1x1})}
    )


def hugging_face_classes(config: Mapping[str, object], num_classes: int) -> Classes | None:
    """The names in config.json, each label being its own id; None where they are only numbered."""
    found = config.get("id2label")
    if not isinstance(found, Mapping) or len(found) != num_classes:
        return None
    names = [str(found.get(str(label), "")) for label in range(num_classes)]
    if not all(names) or all(name == f"LABEL_{label}" for label, name in enumerate(names)):
        return None
    return Classes(distinct_names(names), tuple(range(num_classes)))


def hugging_face_config(settings: DetectorSettings, classes: Classes | None) -> dict[str, object]:
    """The config.json of a detector.

    Raises:
        WeightsError: transformers cannot express it.
    """
    _refuse_inexpressible(settings)
    name = settings.backbone.name
    assert is_resnet(name)
    bottleneck, depths = resnet_layout(name)
    stages = 4 if settings.backbone.output == "layer4" else 3
    count = settings.num_classes or 0
    names = [f"LABEL_{label}" for label in range(count)] if classes is None else classes.names
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "activation_function": "relu",
        "auxiliary_loss": False,
        "backbone_config": {
            "model_type": "resnet",
            "depths": list(depths[:stages]),
            "downsample_in_bottleneck": settings.backbone.stride_in_1x1,
            "embedding_size": 64,
            "hidden_sizes": [stage_channels(name, stage) for stage in range(stages)],
            "layer_type": "bottleneck" if bottleneck else "basic",
            "out_features": [f"stage{stages}"],
        },
        "d_model": settings.hidden_dim,
        "decoder_attention_heads": settings.num_heads,
        "decoder_ffn_dim": settings.feedforward_dim,
        "decoder_layers": settings.decoder_layers,
        "dilation": False,
        "dropout": settings.dropout,
        "dtype": "float32",
        "encoder_attention_heads": settings.num_heads,
        "encoder_ffn_dim": settings.feedforward_dim,
        "encoder_layers": settings.encoder_layers,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "num_queries": settings.num_queries,
        "position_embedding_type": settings.position,
    }


def hugging_face_processor(short_side: int, max_size: int) -> dict[str, object]:
    """The preprocessor_config.json for pictures of the given size in pixels."""
    return {
        "image_processor_type": "DetrImageProcessor",
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": short_side, "longest_edge": max_size},
    }


def _refuse_unlike(config: Mapping[str, object], heads: object, source: str) -> None:
    usual = {
        "model_type": "detr",
        "activation_function": "relu",
        "decoder_attention_heads": heads,
        "num_channels": 3,
    }
    for key, value in usual.items():
        if config.get(key, value) != value:
            raise WeightsError(
                f"{source}: config.json has {key}={config[key]!r}, this DETR needs {value!r}; "
                "give a DetrForObjectDetection like the published ones"
            )


def _refuse_inexpressible(settings: DetectorSettings) -> None:
    lacking = (
        (not is_resnet(settings.backbone.name), f"backbone.name={settings.backbone.name}"),
        (
            "deformable" in (settings.encoder_attention, settings.decoder_attention),
            "deformable attention",
        ),
        (settings.decoder_attention == "conditional", "decoder_attention=conditional"),
        *beyond_others(settings),
        (settings.rho is not None, "rho, a sparse encoder"),
        (settings.class_scores == "sigmoid", "class_scores=sigmoid"),
        (settings.pre_norm, "pre_norm=true, as UP-DETR's weights have it"),
        (settings.backbone.dilation, "backbone.dilation=true without timm"),
        (settings.num_classes is None, "a class count of none"),
    )
    for is_so, what in lacking:
        if is_so:
            raise WeightsError(
                f"transformers' DetrForObjectDetection cannot express {what}; "
                "export with format querypatch, detr or onnx"
            )


def _our_name(theirs: str) -> str:
    theirs = theirs.replace(_OLD_POSITIONS, "model.position_embedding.")
    found = next((pair for pair in NAMES if theirs.startswith(pair[1])), None)
    if found is None:
        return theirs
    begin, public = found
    rest = theirs.removeprefix(public)
    if begin == "backbone.body.":
        return begin + our_backbone_name(rest)
    return begin + _replaced(rest, [(b, a) for a, b in _layer_names(begin)])


def _their_name(ours: str) -> str:
    begin, public = next(pair for pair in NAMES if ours.startswith(pair[0]))
    rest = ours.removeprefix(begin)
    if begin == "backbone.body.":
        return public + _their_backbone_name(rest)
    return public + _replaced(rest, _layer_names(begin))


def _layer_names(begin: str) -> tuple[tuple[str, str], ...]:
    match begin:
        case "encoder.":
            return (*ENCODER_NAMES, *INNER_NAMES)
        case "decoder.":
            return (*DECODER_NAMES, *INNER_NAMES)
        case _:
            return ()


def _replaced(rest: str, pairs: Iterable[tuple[str, str]]) -> str:
    """`layers.3.norm1.bias` with the one part that stands between dots replaced."""
    for old, new in pairs:
        rest = f".{rest}".replace(f".{old}.", f".{new}.")[1:]
    return rest


def our_backbone_name(rest: str) -> str:
    """Out of transformers' own ResNet; timm's names are ours already and stay."""
    part, _, tensor = rest.rpartition(".")
    if part.startswith(_THEIR_STEM):
        return f"{'conv1' if part.endswith('convolution') else 'bn1'}.{tensor}"
    found = _THEIR_BLOCK.fullmatch(part)
    if found is None:
        return rest
    stage, block, _, layer, kind = found.groups()
    is_convolution = kind == "convolution"
    place = f"layer{int(stage) + 1}.{block}"
    if layer is None:
        return f"{place}.downsample.{0 if is_convolution else 1}.{tensor}"
    return f"{place}.{'conv' if is_convolution else 'bn'}{int(layer) + 1}.{tensor}"


def _their_backbone_name(rest: str) -> str:
    part, _, tensor = rest.rpartition(".")
    found = _OUR_BLOCK.fullmatch(part)
    if found is None:
        return f"{_THEIR_STEM}{'convolution' if part == 'conv1' else 'normalization'}.{tensor}"
    stage, block, kind, number = found.groups()
    is_convolution = kind == "conv" or (kind == "downsample." and number == "0")
    place = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    layer = "shortcut" if kind == "downsample." else f"layer.{int(number) - 1}"
    return f"{place}.{layer}.{'convolution' if is_convolution else 'normalization'}.{tensor}"
