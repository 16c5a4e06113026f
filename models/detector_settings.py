"""The architecture of a detector, as data: DETR by default, its descendants by choice."""

from typing import Literal, Self

from pydantic import Field, model_validator

from models.backbone import BackboneSettings
from models.matching import ClassScores
from models.position import TEMPERATURE, PositionCode
from models.postprocess import MAX_PAIRS, MAX_PAIRS_OF_ANCHORS
from models.selection import SelectionSettings
from models.settings import Settings

AttentionKind = Literal["dense", "deformable"]
DecoderAttention = Literal["dense", "conditional", "deformable"]
QueryKind = Literal["position", "anchor"]
Activation = Literal["relu", "prelu"]

BACKBONE_LEVELS = 3
"""The most maps that a detector takes from its backbone; further levels are made of the last."""


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
    position_temperature: float = Field(default=TEMPERATURE, gt=1)
    """Longest period of the sine waves, in turns (DAB-DETR: 20, its plain DC5 weights 10)."""
    scale_positions: bool = False
    """Scale each token's code in every encoder layer by what the token has become (DAB-DETR)."""
    activation: Activation = "relu"
    """Of the feed-forward networks; prelu learns its slope below 0, one per layer (DAB-DETR)."""
    num_queries: int = Field(default=100, gt=0)
    """Object queries, the most boxes that one picture can get."""
    num_classes: int | None = Field(default=None, gt=0)
    """Classes, labelled from 0 on; "no object" is not one of them, but a last logit of its own
    where class_scores=softmax. Null takes as many as the data have, before the detector is made.
    """
    class_scores: ClassScores = "softmax"
    """Classes that exclude each other and "no object" (DETR), or one probability each, trained by
    the focal loss (sigmoid, Deformable DETR).
    """
    encoder_attention: AttentionKind = "dense"
    """How tokens attend to each other: all to all, or each to a few sampled points."""
    decoder_attention: DecoderAttention = "dense"
    """How queries attend to tokens: to all, to all by content beside place (Conditional DETR), or
    to a few sampled points.
    """
    query_kind: QueryKind = "position"
    """What a learned query is: a vector, or a box that every decoder layer moves (DAB-DETR)."""
    num_patterns: int = Field(default=0, ge=0)
    """Learned contents that each anchor is looked from, num_queries anchors with each; 0 begins
    with empty contents.
    """
    feature_levels: int = Field(default=1, gt=0, le=8)
    """Feature maps, each of half the size of the one before; more than one only with
    encoder_attention=deformable. The backbone gives its last three at the most.
    """
    encoder_points: int = Field(default=4, gt=0)
    """Points that deformable attention samples per head and level in the encoder."""
    decoder_points: int = Field(default=4, gt=0)
    """The same in the decoder."""
    box_refinement: bool = False
    """Let every decoder layer start from the boxes of the one before, with heads of its own."""
    two_stage: bool = False
    """Make the queries of the best boxes that tokens propose, in place of learned ones."""
    proposal_content: Literal["position", "memory"] = "position"
    """Two-stage: what a query holds at first, a code of its box (Deformable DETR) or its token."""
    proposal_classes: Literal["binary", "all"] = "binary"
    """What tokens say before the decoder: object or not (Deformable DETR), or the class as well."""
    rho: float | None = Field(default=None, gt=0, le=1)
    """Share of the tokens that the encoder updates (Sparse DETR); null updates all. May be another
    one whenever the weights are used.
    """
    selection: SelectionSettings = SelectionSettings()
    """How these tokens are chosen."""

    @property
    def backbone_levels(self) -> int:
        """Maps that the backbone gives."""
        return min(self.feature_levels, BACKBONE_LEVELS)

    @property
    def learns_selection(self) -> bool:
        """True where a scoring network learns from the decoder's attention."""
        return self.rho is not None and self.selection.criterion == "dam"

    @property
    def refines_boxes(self) -> bool:
        """True where every decoder layer starts from the boxes of the one before."""
        return self.box_refinement or self.query_kind == "anchor"

    @property
    def total_queries(self) -> int:
        """Object queries in the decoder, one box each: each anchor once with every pattern."""
        return self.num_queries * max(1, self.num_patterns)

    @property
    def max_pairs(self) -> int:
        """Boxes of a picture where scores are sigmoid, as the public code of each paper takes."""
        return MAX_PAIRS_OF_ANCHORS if self.query_kind == "anchor" else MAX_PAIRS

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

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.feature_levels > 1 and self.encoder_attention == "dense":
            raise ValueError(
                f"feature_levels={self.feature_levels} with encoder_attention=dense would attend "
                "from every token to every other; use encoder_attention=deformable"
            )
        deformable = "deformable" in (self.encoder_attention, self.decoder_attention)
        if deformable and self.pre_norm:
            raise ValueError(
                "pre_norm=true goes with dense attention alone; use pre_norm=false with "
                "deformable attention"
            )
        if self.encoder_attention == "deformable" and self.position == "learned":
            raise ValueError(
                "position=learned goes with encoder_attention=dense alone; use position=sine"
            )
        if self.box_refinement and self.decoder_attention == "dense":
            raise ValueError(
                "box_refinement=true moves reference points, which decoder_attention=dense has "
                "not; use decoder_attention=deformable"
            )
        if self.box_refinement and self.decoder_attention == "conditional":
            raise ValueError(
                "box_refinement=true moves reference points, those of decoder_attention="
                "conditional stay; use box_refinement=false, and query_kind=anchor for boxes that "
                "every layer moves"
            )
        if self.two_stage and not self.box_refinement:
            raise ValueError(
                "two_stage=true begins with boxes, which box_refinement=false cannot take up; use "
                "box_refinement=true and decoder_attention=deformable"
            )
        return self

    @model_validator(mode="after")
    def _queries_fit(self) -> Self:
        if self.decoder_attention == "conditional" and self.pre_norm:
            raise ValueError(
                "pre_norm=true goes with dense attention alone; use pre_norm=false with "
                "decoder_attention=conditional"
            )
        if self.query_kind == "anchor" and self.decoder_attention != "conditional":
            raise ValueError(
                f"query_kind=anchor with decoder_attention={self.decoder_attention}: anchors say "
                "where to look by conditional attention; use decoder_attention=conditional"
            )
        if self.num_patterns and self.query_kind != "anchor":
            raise ValueError(
                f"num_patterns={self.num_patterns} goes with query_kind=anchor alone; use "
                "num_patterns=0, or query_kind=anchor"
            )
        if self.scale_positions and (self.encoder_attention != "dense" or self.rho is not None):
            raise ValueError(
                "scale_positions=true goes with an encoder that attends densely and updates all "
                "tokens; use encoder_attention=dense and rho=null, or scale_positions=false"
            )
        if self.position == "learned" and self.position_temperature != TEMPERATURE:
            raise ValueError(
                f"position_temperature={self.position_temperature} is of sine waves, which "
                "position=learned has not; use position=sine"
            )
        return self

    @model_validator(mode="after")
    def _encoder_fits(self) -> Self:
        if self.rho is not None and self.encoder_layers == 0:
            raise ValueError(
                f"rho={self.rho} chooses tokens for an encoder that encoder_layers=0 leaves out; "
                "use rho=null or more layers"
            )
        return self
