"""DETR: a CNN, a transformer, and object queries that each say one box (Carion et al., ECCV 2020).

One architecture for all detectors: `encode` turns pictures into a memory, `decode` lets groups of
queries read it with shared weights. UP-DETR adds its patches to the queries outside
(`models.patch_queries`); nothing here knows of them.
"""

from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.backbone import Backbone, BackboneSettings, feature_padding
from models.initialise import initialise
from models.position import LearnedPositions, PositionCode, sine_positions
from models.settings import Settings
from models.structures import DetectorOutput, GroupOutput, Images, LayerOutput, Memory, QueryGroup
from models.transformer import DecodedLayer, Decoder, Encoder, TransformerShape


class DetectorSettings(Settings):
    """A DETR detector; the defaults are those of the paper."""

    backbone: BackboneSettings
    """The CNN."""
    hidden_dim: int = Field(default=256, gt=0)
    """Channels of tokens and queries."""
    num_heads: int = Field(default=8, gt=0)
    """Attention heads; they share hidden_dim evenly."""
    encoder_layers: int = Field(default=6, ge=0)
    """Layers of the encoder."""
    decoder_layers: int = Field(default=6, gt=0)
    """Layers of the decoder; each one is supervised."""
    feedforward_dim: int = Field(default=2048, gt=0)
    """Inner channels of the feed-forward networks."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights, sublayer outputs and inner values dropped in training."""
    pre_norm: bool = False
    """Normalise before each sublayer (UP-DETR's public weights) instead of after it (DETR)."""
    position: PositionCode = "sine"
    """How a token says where it is: sine waves, or learned vectors for at most 50 x 50 cells."""
    num_queries: int = Field(default=100, gt=0)
    """Object queries, the most boxes that one picture can get."""
    num_classes: int | None = Field(default=None, gt=0)
    """Classes, labelled from 0 on; "no object" is not one of them, but a last logit of its own.
    Null takes as many as the data have, before the detector is made.
    """

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} cannot be shared evenly between "
                f"num_heads={self.num_heads}; use a multiple, e.g. hidden_dim={self.num_heads * 32}"
            )
        if self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} must be a multiple of 4, for sines and cosines of "
                f"two axes; use e.g. hidden_dim={-(-self.hidden_dim // 4) * 4}"
            )
        return self


class Detector(nn.Module):
    """A detector with weights drawn from `generator`; `models.interop` loads published ones."""

    def __init__(self, settings: DetectorSettings, generator: torch.Generator) -> None:
        super().__init__()
        if settings.num_classes is None:
            raise ValueError("num_classes is null: a detector needs a number, that of its data")
        self.settings = settings
        shape = TransformerShape(
            dim=settings.hidden_dim,
            num_heads=settings.num_heads,
            feedforward_dim=settings.feedforward_dim,
            dropout=settings.dropout,
            pre_norm=settings.pre_norm,
        )
        self.backbone = Backbone(settings.backbone)
        self.input_projection = nn.Linear(self.backbone.channels, settings.hidden_dim)
        self.learned_positions = (
            LearnedPositions(settings.hidden_dim) if settings.position == "learned" else None
        )
        self.encoder = Encoder(shape, settings.encoder_layers)
        self.decoder = Decoder(shape, settings.decoder_layers)
        self.queries = nn.Embedding(settings.num_queries, settings.hidden_dim)
        self.class_head = nn.Linear(settings.hidden_dim, settings.num_classes + 1)
        self.box_head = Perceptron(settings.hidden_dim, settings.hidden_dim, 4, num_layers=3)
        initialise(self, generator)

    def forward(self, images: Images, record: bool = False) -> DetectorOutput:
        """What the object queries find, and with `record` where each layer and head looked."""
        return self.decode(self.encode(images), (self.query_group(len(images.sizes)),), record)

    def encode(self, images: Images) -> Memory:
        """The pictures as tokens, one level."""
        return self.encode_features(self.backbone(images.pixels), images.padding)

    def encode_features(
        self,
        features: Float[Tensor, "batch channels rows columns"],
        padding: Bool[Tensor, "batch height width"],
    ) -> Memory:
        """The backbone's features of pictures with the given padding as tokens, one level."""
        rows, columns = features.shape[-2:]
        cells_padding = feature_padding(padding, rows, columns)
        position = self._positions(cells_padding).flatten(1, 2)
        flat_padding = cells_padding.flatten(1)
        return Memory(
            tokens=self.encoder(self.project(features), position, flat_padding),
            position=position,
            padding=flat_padding,
            spatial_shapes=((rows, columns),),
            valid_ratios=_valid_ratios(cells_padding),
        )

    def project(
        self, features: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The backbone's features as the encoder takes them in."""
        tokens = features.permute(0, 2, 3, 1).flatten(1, 2).to(self.input_projection.weight.dtype)
        projected: Tensor = self.input_projection(tokens)
        return projected

    def decode(
        self, memory: Memory, groups: tuple[QueryGroup, ...], record: bool = False
    ) -> DetectorOutput:
        """What each group finds; a group's answer does not depend on the other groups."""
        decoded = self.decoder(memory, groups, record)
        return DetectorOutput(
            groups=tuple(
                GroupOutput(group.name, self._read(layers))
                for group, layers in zip(groups, decoded, strict=True)
            ),
            memory=memory,
        )

    def query_group(self, batch: int) -> QueryGroup:
        """The object queries: empty content, learned positions."""
        position = self.queries.weight.expand(batch, -1, -1)
        return QueryGroup("queries", content=torch.zeros_like(position), position=position)

    def _positions(self, padding: Bool[Tensor, "batch rows columns"]) -> Tensor:
        if self.learned_positions is None:
            return sine_positions(padding, self.settings.hidden_dim)
        learned: Tensor = self.learned_positions(padding)
        return learned

    def _read(self, layers: tuple[DecodedLayer, ...]) -> tuple[LayerOutput, ...]:
        """The heads on all layers at once; float32, since bfloat16 rounds boxes to about 1/500."""
        hidden = torch.stack([layer.hidden for layer in layers])
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.class_head.weight.dtype)
            logits = self.class_head(hidden)
            boxes = self.box_head(hidden).sigmoid()
        return tuple(
            LayerOutput(
                hidden=hidden[number],
                logits=logits[number],
                boxes=boxes[number],
                self_attention=layer.self_attention,
                cross_attention=layer.cross_attention,
            )
            for number, layer in enumerate(layers)
        )


class Perceptron(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim_in: int, dim_inner: int, dim_out: int, *, num_layers: int) -> None:
        super().__init__()
        dims = [dim_in] + [dim_inner] * (num_layers - 1) + [dim_out]
        self.layers = nn.ModuleList(nn.Linear(dims[n], dims[n + 1]) for n in range(num_layers))

    def forward(self, tokens: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim_out"]:
        """The last layer's output, without an activation."""
        *inner, last = self.layers
        for layer in inner:
            tokens = F.relu(layer(tokens))
        projected: Tensor = last(tokens)
        return projected


def _valid_ratios(padding: Bool[Tensor, "batch rows columns"]) -> Float[Tensor, "batch 1 2"]:
    valid = ~padding
    rows = valid[:, :, 0].float().mean(1)
    columns = valid[:, 0, :].float().mean(1)
    return torch.stack((rows, columns), dim=-1)[:, None, :]
