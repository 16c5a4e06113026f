"""The detectors: a CNN, a transformer, and object queries that each say one box.

DETR (Carion et al., ECCV 2020), Conditional DETR (Meng et al., ICCV 2021), DAB-DETR (Liu et al.,
ICLR 2022), Deformable DETR (Zhu et al., ICLR 2021) and Sparse DETR (Roh et al., ICLR 2022) in one
architecture: `encode` turns pictures into a memory, `decode` lets groups of queries read it with
shared weights. UP-DETR adds its patches to the queries outside (`models.patch_queries`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.backbone import Backbone, feature_padding
from models.decoder import DecodedLayer, Decoder, decoder_shape, position_kind
from models.deformable_attention import cell_centres
from models.detector_settings import DetectorSettings
from models.heads import (
    BoxHead,
    Perceptron,
    box_heads,
    class_heads,
    read_boxes,
    read_boxes_by_logit,
    read_logits,
)
from models.initialise import begin, initialise
from models.levels import input_levels, level_paddings, project_levels, valid_ratios
from models.position import LearnedPositions, sine_positions
from models.proposals import (
    FirstBoxes,
    ProposalQueries,
    ProposalTokens,
    best_proposals,
    first_boxes,
    predict_tokens,
    queries_of,
)
from models.query_positions import anchor_queries
from models.selection import TokenScorer, chance, select_tokens
from models.structures import (
    DetectorOutput,
    GroupOutput,
    Images,
    LayerOutput,
    LearnedQueries,
    Memory,
    QueryGroup,
    Record,
    TokenPredictions,
    TokenSelection,
)
from models.transformer import Cells, EncodedCells, Encoder, encoder_shape, take


class Detector(nn.Module):
    """A detector with weights drawn from `generator`; `models.interop` loads published ones."""

    def __init__(self, settings: DetectorSettings, generator: torch.Generator) -> None:
        super().__init__()
        if settings.num_classes is None:
            raise ValueError("num_classes is null: a detector needs a number, that of its data")
        self.settings = settings
        dim = settings.hidden_dim
        self.backbone = Backbone(settings.backbone, settings.backbone_levels)
        self._make_input(settings)
        self.encoder = Encoder(
            encoder_shape(settings),
            settings.encoder_layers,
            scales_positions=settings.scale_positions,
        )
        self.decoder = Decoder(
            decoder_shape(settings), settings.decoder_layers, position_kind(settings)
        )
        self._make_queries(settings)
        depth = settings.decoder_layers if settings.box_refinement else None
        self.class_head = _heads(depth, lambda: nn.Linear(dim, num_logits(settings)))
        self.box_head = _heads(depth, lambda: BoxHead(dim))
        self._make_token_heads(settings)
        initialise(self, generator)
        begin(self, settings, generator)

    def forward(
        self, images: Images, record: Record = "nothing", adopted: QueryGroup | None = None
    ) -> DetectorOutput:
        """What the object queries find, and with `record` where each layer and head looked.

        Where a scoring network learns, training records the attention to the memory anyhow.
        `adopted` is a second group, of a teacher's queries (`models.query_exchange`).
        """
        memory = self.encode(images)
        others = () if adopted is None else (self._adopted(adopted),)
        return self.decode(memory, (self.query_group(memory), *others), record)

    def encode(self, images: Images) -> Memory:
        """The pictures as tokens."""
        features = self.backbone.levels(images.pixels, self.settings.backbone_levels)
        return self.encode_features(features, images.padding)

    def encode_features(
        self,
        features: tuple[Float[Tensor, "batch _ _ _"], ...],
        padding: Bool[Tensor, "batch height width"],
    ) -> Memory:
        """The backbone's maps of pictures with the given padding as tokens, finest level first."""
        cells = self._cells(features, padding)
        first = None
        if self.settings.two_stage or self.settings.rho is not None:
            first = first_boxes(cells.padding, cells.spatial_shapes)
        selection, objectness = self._select(cells, first)
        auxiliary = self.encoder_class_head is not None and self.training
        encoded = self.encoder(cells, selection, keep_layers=auxiliary)
        return Memory(
            tokens=encoded.tokens,
            position=cells.position,
            padding=cells.padding,
            spatial_shapes=cells.spatial_shapes,
            valid_ratios=cells.valid_ratios,
            selection=selection,
            proposals=self._propose(encoded.tokens, first),
            encoder_layers=self._read_encoder(encoded, first, selection) if auxiliary else (),
            objectness=objectness,
        )

    def project(
        self, features: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """A dense encoder's only map as it takes it in."""
        assert self.input_projection is not None
        tokens = features.permute(0, 2, 3, 1).flatten(1, 2).to(self.input_projection.weight.dtype)
        projected: Tensor = self.input_projection(tokens)
        return projected

    def decode(
        self, memory: Memory, groups: tuple[QueryGroup, ...], record: Record = "nothing"
    ) -> DetectorOutput:
        """What each group finds; a group's answer does not depend on the other groups."""
        if record == "nothing" and self.training and self.settings.learns_selection:
            record = "cross"
        refining = None
        if self.settings.refines_boxes:
            refining = box_heads(self.box_head, self.settings.decoder_layers)
        decoded = self.decoder(memory, groups, record, refining)
        return DetectorOutput(
            groups=tuple(
                GroupOutput(group.name, self._read(layers))
                for group, layers in zip(groups, decoded, strict=True)
            ),
            memory=memory,
        )

    def query_group(self, memory: Memory) -> QueryGroup:
        """The object queries: learned ones, or the best proposals of the memory's tokens.

        There are never more of the latter than tokens.
        """
        if memory.proposals is None:
            return self.learned_queries().of_pictures("queries", memory.tokens.shape[0])
        assert self.proposal_queries is not None
        best = best_proposals(self.proposal_scores(memory.proposals), self.settings.num_queries)
        return queries_of(best, memory.proposals, memory.tokens, self.proposal_queries)

    def _adopted(self, group: QueryGroup) -> QueryGroup:
        """With this detector's points where the group has none."""
        if group.reference is not None or self.reference_points is None:
            return group
        assert group.position is not None
        return replace(group, reference=self.references_of(group.position))

    def learned_queries(self) -> LearnedQueries:
        """The queries that are parameters; ValueError for a two-stage detector, without any."""
        if self.queries is None:
            raise ValueError(
                "two_stage=true has no learned queries; use two_stage=false, and two_stage=true "
                "when the transformer is finetuned"
            )
        vectors = self.queries.weight
        if self.settings.query_kind == "anchor":
            return anchor_queries(vectors, self.patterns, self.settings.hidden_dim)
        if self.reference_points is None:
            return LearnedQueries(vectors, torch.zeros_like(vectors), None)
        if self.settings.decoder_attention == "conditional":
            position, content = vectors, torch.zeros_like(vectors)
        else:
            position, content = vectors.chunk(2, dim=-1)
        return LearnedQueries(position, content, self.references_of(position))

    def references_of(self, position: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any 2"]:
        """Where queries with these position vectors look around: points (x, y), float32.

        Of detectors whose queries have points, Conditional and Deformable DETR, alone.
        """
        assert self.reference_points is not None
        with torch.autocast(position.device.type, enabled=False):
            said: Tensor = self.reference_points(position)
            return said.sigmoid()

    def proposal_scores(self, proposals: TokenPredictions) -> Float[Tensor, "batch tokens"]:
        """How good a query each token would make: its best class, or that it is an object."""
        return token_scores(proposals.logits, self.settings)

    def _make_input(self, settings: DetectorSettings) -> None:
        dim, several = settings.hidden_dim, settings.encoder_attention == "deformable"
        self.input_projection = None if several else nn.Linear(self.backbone.channels, dim)
        self.input_projections, self.level_embedding = None, None
        if several:
            channels = self.backbone.level_channels(settings.backbone_levels)
            self.input_projections = input_levels(channels, dim, settings.feature_levels)
            self.level_embedding = nn.Parameter(torch.empty(settings.feature_levels, dim))
        learned = settings.position == "learned"
        self.learned_positions = LearnedPositions(dim) if learned else None

    def _make_queries(self, settings: DetectorSettings) -> None:
        dim = settings.hidden_dim
        samples = settings.decoder_attention == "deformable"
        self.queries, self.proposal_queries = None, None
        self.reference_points: nn.Linear | Perceptron | None = None
        self.patterns = nn.Embedding(settings.num_patterns, dim) if settings.num_patterns else None
        if settings.two_stage:
            keeps_token = settings.proposal_content == "memory"
            self.proposal_queries = ProposalQueries(dim, dim if keeps_token else 2 * dim)
            return
        anchors = settings.query_kind == "anchor"
        self.queries = nn.Embedding(settings.num_queries, 4 if anchors else dim * (1 + samples))
        if samples:
            self.reference_points = nn.Linear(dim, 2)
        elif settings.decoder_attention == "conditional" and not anchors:
            self.reference_points = Perceptron(dim, dim, 2, num_layers=2)

    def _make_token_heads(self, settings: DetectorSettings) -> None:
        """What tokens say before and after the encoder, where anything is asked of them."""
        dim, logits, sparse = settings.hidden_dim, num_logits(settings), settings.rho is not None
        chosen = settings.selection
        asked = settings.two_stage or (sparse and chosen.criterion != "random")
        self.proposal_tokens = ProposalTokens(dim) if asked else None
        self.proposal_class_head = nn.Linear(dim, logits) if settings.two_stage else None
        self.proposal_box_head = BoxHead(dim) if settings.two_stage else None
        self.scorer = TokenScorer(dim) if settings.learns_selection else None
        rates = sparse and chosen.criterion == "objectness"
        self.objectness_class_head = nn.Linear(dim, logits) if rates else None
        self.objectness_box_head = BoxHead(dim) if rates else None
        inner = settings.encoder_layers - 1
        auxiliary = sparse and chosen.encoder_auxiliary and inner > 0
        self.encoder_class_head = (
            _heads(inner, lambda: nn.Linear(dim, logits)) if auxiliary else None
        )
        self.encoder_box_head = _heads(inner, lambda: BoxHead(dim)) if auxiliary else None

    def _cells(
        self,
        features: tuple[Float[Tensor, "batch _ _ _"], ...],
        padding: Bool[Tensor, "batch height width"],
    ) -> Cells:
        if self.input_projections is None:
            (only,) = features
            rows, columns = only.shape[-2:]
            paddings: tuple[Tensor, ...] = (feature_padding(padding, rows, columns),)
            tokens, position = self.project(only), self._positions(paddings[0]).flatten(1, 2)
        else:
            assert self.level_embedding is not None
            maps = project_levels(self.input_projections, features)
            paddings = level_paddings(padding, maps)
            tokens = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)
            codes = [
                self._positions(one).flatten(1, 2) + self.level_embedding[level]
                for level, one in enumerate(paddings)
            ]
            position = torch.cat(codes, dim=1)
        shapes = tuple((one.shape[1], one.shape[2]) for one in paddings)
        ratios = valid_ratios(paddings)
        sampled = self.settings.encoder_attention == "deformable"
        return Cells(
            tokens=tokens,
            position=position,
            padding=torch.cat([one.flatten(1) for one in paddings], dim=1),
            spatial_shapes=shapes,
            valid_ratios=ratios,
            references=cell_centres(shapes, ratios) if sampled else None,
        )

    def _positions(self, padding: Bool[Tensor, "batch rows columns"]) -> Tensor:
        if self.learned_positions is None:
            return sine_positions(
                padding,
                self.settings.hidden_dim,
                at_centres=self.settings.encoder_attention == "deformable",
                temperature=self.settings.position_temperature,
            )
        learned: Tensor = self.learned_positions(padding)
        return learned

    def _select(
        self, cells: Cells, first: FirstBoxes | None
    ) -> tuple[TokenSelection | None, TokenPredictions | None]:
        """The tokens to update and, where they are scored as detectors, what training hears."""
        rho, chosen = self.settings.rho, self.settings.selection
        if rho is None:
            return None, None
        assert first is not None
        if chosen.criterion == "random":
            return select_tokens(chance(cells.padding, self.training), cells.padding, rho), None
        features = self._proposing(cells.tokens + cells.position, first)
        if self.scorer is not None:
            left_out = None if chosen.legacy_padding else cells.padding
            scores = self.scorer(features, left_out)
            selection = select_tokens(
                scores, cells.padding, rho, scores=scores, beyond_valid=chosen.legacy_padding
            )
            return selection, None
        assert self.objectness_class_head is not None
        assert self.objectness_box_head is not None
        logits = read_logits(self.objectness_class_head, features)
        selection = select_tokens(token_scores(logits, self.settings), cells.padding, rho)
        if not self.training:
            return selection, None
        boxes = read_boxes_by_logit(self.objectness_box_head, features, first.logits)
        return selection, TokenPredictions(logits, boxes)

    def _propose(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        first: FirstBoxes | None,
    ) -> TokenPredictions | None:
        if self.proposal_class_head is None or self.proposal_box_head is None:
            return None
        assert first is not None
        features = self._proposing(tokens, first)
        return predict_tokens(
            features, first.logits, self.proposal_class_head, self.proposal_box_head
        )

    def _proposing(self, tokens: Tensor, first: FirstBoxes) -> Tensor:
        """The same projection before the encoder, for scores, and after it, for proposals."""
        assert self.proposal_tokens is not None
        features: Tensor = self.proposal_tokens(tokens, first.usable)
        return features

    def _read_encoder(
        self, encoded: EncodedCells, first: FirstBoxes | None, selection: TokenSelection | None
    ) -> tuple[TokenPredictions, ...]:
        """What the updated tokens say after each layer but the last."""
        assert self.encoder_class_head is not None
        assert self.encoder_box_head is not None
        assert first is not None
        start = take(first.logits, selection)
        layers = encoded.updated[:-1]
        classes = class_heads(self.encoder_class_head, len(layers))
        boxes = box_heads(self.encoder_box_head, len(layers))
        return tuple(
            predict_tokens(updated, start, class_head, box_head)
            for updated, class_head, box_head in zip(layers, classes, boxes, strict=True)
        )

    def _read(self, layers: tuple[DecodedLayer, ...]) -> tuple[LayerOutput, ...]:
        """The heads on the layers; all at once where they are shared."""
        hidden = torch.stack([layer.hidden for layer in layers])
        if isinstance(self.class_head, nn.Linear):
            logits = read_logits(self.class_head, hidden)
        else:
            heads = class_heads(self.class_head, len(layers))
            logits = torch.stack([read_logits(head, hidden[n]) for n, head in enumerate(heads)])
        boxes = [layer.boxes for layer in layers if layer.boxes is not None]
        if not boxes:
            assert isinstance(self.box_head, BoxHead)
            boxes = list(read_boxes(self.box_head, hidden, layers[0].reference))
        return tuple(
            LayerOutput(
                hidden=layer.hidden,
                logits=logits[number],
                boxes=boxes[number],
                reference=layer.reference,
                self_attention=layer.self_attention,
                cross_attention=layer.cross_attention,
            )
            for number, layer in enumerate(layers)
        )


def num_logits(settings: DetectorSettings) -> int:
    """Logits of a class head: one per class, and one for "no object" where they exclude it."""
    assert settings.num_classes is not None
    return settings.num_classes + (settings.class_scores == "softmax")


def token_scores(
    logits: Float[Tensor, "batch tokens classes"], settings: DetectorSettings
) -> Float[Tensor, "batch tokens"]:
    """What ranks tokens: the logit of the best class, never "no object", or of being any object."""
    if settings.proposal_classes == "all":
        return logits[..., : settings.num_classes].amax(-1)
    return logits[..., 0]


def _heads(depth: int | None, make: Callable[[], nn.Module]) -> nn.Module:
    """One head for all layers, or one per layer."""
    return make() if depth is None else nn.ModuleList(make() for _ in range(depth))
