"""Which Deformable or Sparse DETR a public file holds, told by its tensors and its command line.

Tensors tell levels, points, depths, refinement and two stages. The keep ratio, the number of heads,
dilation and what a two-stage head learned from leave no trace; files of the public code hold the
`args` of their run, which say it, and what is then still open gets its usual value and is listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from models.backbone import BackboneSettings
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.deformable import is_public_swin, public_layout
from models.interop.detr import count_layers, resnet_name
from models.selection import SelectionSettings

ProposalContent = Literal["position", "memory"]

USUAL_HEADS = 8
USUAL_POINTS = 4
USUAL_QUERIES = 300
USUAL_RHO = 0.3

_ENCODER = "transformer.encoder.layers.{}."
_DECODER = "transformer.decoder.layers.{}."


def deformable_settings(
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    arguments: Mapping[str, object] | None = None,
    train_backbone: bool = False,
) -> tuple[DetectorSettings, tuple[str, ...]]:
    """The architecture that public tensors belong to, and the keys of it that are guessed.

    `arguments` is what the file's `args` say, by the public names.

    Raises:
        WeightsError: the tensors are not those of a Deformable or Sparse DETR.
    """
    layout = public_layout(tensors, source=source)
    told = _Told(arguments or {})
    heads = told.number("nheads", "num_heads", USUAL_HEADS)
    hidden_dim = len(tensors["input_proj.0.0.weight"])
    encoder_layers = count_layers(tensors, _ENCODER + "norm1.weight")
    content = _content(tensors, hidden_dim)
    rho = _rho(tensors, told)
    settings = DetectorSettings(
        backbone=_backbone(tensors, told, source, train_backbone),
        hidden_dim=hidden_dim,
        num_heads=heads,
        encoder_layers=encoder_layers,
        decoder_layers=layout.decoder_layers,
        feedforward_dim=len(tensors[_DECODER.format(0) + "linear1.weight"]),
        encoder_attention="deformable",
        decoder_attention="deformable",
        feature_levels=layout.levels,
        encoder_points=_points(tensors, _ENCODER + "self_attn.", heads * layout.levels, source),
        decoder_points=_points(tensors, _DECODER + "cross_attn.", heads * layout.levels, source),
        box_refinement=layout.box_refinement,
        two_stage=layout.two_stage,
        proposal_content=content,
        proposal_classes=_proposal_classes(told, content),
        rho=rho,
        selection=SelectionSettings(
            encoder_auxiliary=layout.encoder_heads > 0 or encoder_layers < 2 or rho is None
        ),
        class_scores="sigmoid",
        num_queries=_num_queries(tensors, told),
        num_classes=len(tensors["class_embed.0.weight"]),
    )
    return settings, tuple(told.guessed)


@dataclass
class _Told:
    """What the command line says; what it does not say is guessed, and taken down."""

    arguments: Mapping[str, object]
    guessed: list[str] = field(default_factory=list)

    def number(self, name: str, key: str, usual: int) -> int:
        value = self.arguments.get(name)
        if isinstance(value, int) and value > 0:
            return value
        self.guessed.append(key)
        return usual

    def share(self, name: str, key: str, usual: float) -> float:
        value = self.arguments.get(name)
        if isinstance(value, (int, float)) and 0 < value <= 1:
            return float(value)
        self.guessed.append(key)
        return usual

    def switch(self, name: str, key: str, usual: bool) -> bool:
        value = self.arguments.get(name)
        if isinstance(value, bool):
            return value
        self.guessed.append(key)
        return usual


def _backbone(
    tensors: Mapping[str, Tensor], told: _Told, source: str, train: bool
) -> BackboneSettings:
    if is_public_swin(tensors):
        return BackboneSettings(name="swin_t", weights=source, train=train)
    return BackboneSettings(
        name=resnet_name(tensors, source),
        dilation=told.switch("dilation", "backbone.dilation", False),
        weights=source,
        train=train,
    )


def _points(
    tensors: Mapping[str, Tensor], attention: str, samples_per_point: int, source: str
) -> int:
    """Of the first layer's attention; the usual number where there is no layer."""
    name = attention.format(0) + "attention_weights.weight"
    if name not in tensors:
        return USUAL_POINTS
    rows = len(tensors[name])
    if rows % samples_per_point:
        raise WeightsError(
            f"{source}: {name} has {rows} rows, no multiple of heads x levels = "
            f"{samples_per_point}; it has another number of heads, give num_heads"
        )
    return rows // samples_per_point


def _content(tensors: Mapping[str, Tensor], hidden_dim: int) -> ProposalContent:
    projection = tensors.get("transformer.pos_trans.weight")
    return "memory" if projection is not None and len(projection) == hidden_dim else "position"


def _proposal_classes(told: _Told, content: ProposalContent) -> Literal["binary", "all"]:
    """Deformable DETR knows "binary" alone; with Sparse DETR's queries either is possible."""
    if content == "position" and "eff_specific_head" not in told.arguments:
        return "binary"
    return "all" if told.switch("eff_specific_head", "proposal_classes", True) else "binary"


def _rho(tensors: Mapping[str, Tensor], told: _Told) -> float | None:
    if "transformer.enc_mask_predictor.layer1.0.weight" not in tensors:
        return None
    return told.share("rho", "rho", USUAL_RHO)


def _num_queries(tensors: Mapping[str, Tensor], told: _Told) -> int:
    queries = tensors.get("query_embed.weight")
    if queries is not None:
        return len(queries)
    return told.number("num_queries", "num_queries", USUAL_QUERIES)
