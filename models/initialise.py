"""Random weights of a detector from an explicit generator, with the distributions of its paper.

Transformer: Xavier-uniform matrices, attention biases 0; heads and projections: torch's defaults;
queries N(0, 1); learned positions U(0, 1); ResNet convolutions: He-normal over the outputs, as
torchvision; Swin: normal of deviation 0.02 and biases 0, as its authors; DAT: torch's defaults and
normal bias tables, as its authors (their own initialisation reaches no weight). The same generator
state gives the same weights on every rank and machine.
"""

import math

import torch
from torch import nn

from models.attention import Attention
from models.conditional_attention import ConditionalCrossAttention, ConditionalSelfAttention
from models.dat import Dat
from models.dat_attention import DatAttention
from models.deformable_attention import DeformableAttention
from models.detector_settings import DetectorSettings
from models.heads import BoxHead, begin_at_reference, begin_rare
from models.levels import InputLevel
from models.neighbourhood import NeighbourhoodAttention
from models.position import LearnedPositions
from models.proposals import ProposalQueries, ProposalTokens
from models.query_positions import AnchorPositions, ConditionalPositions
from models.selection import TokenScorer
from models.swin import Swin
from models.transformer import Encoder, FeedForward
from models.windows import WindowAttention

_FIRST_SIZE_LOGIT = -2.0
"""Learned reference points begin with boxes of side sigmoid(-2) = 0.12 (the paper says 0.1)."""


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight of a module anew, in the order of its parts."""
    for part in module.children():
        initialise(part, generator)
    with torch.no_grad():
        _draw(module, generator)


def begin(detector: nn.Module, settings: DetectorSettings, generator: torch.Generator) -> None:
    """First values of a detector's parts that are no distribution of their kind.

    Class heads begin rare and boxes at their references, without a size of their own but for those
    of learned points (Deformable DETR, A.3, A.4; Conditional DETR's public code).
    """
    for name, weight in detector.named_parameters():
        if name == "level_embedding":
            nn.init.normal_(weight, generator=generator)
        elif name.startswith(("reference_points.", "patterns.")) and weight.dim() > 1:
            nn.init.xavier_uniform_(weight, generator=generator)
        elif name == "reference_points.bias":
            nn.init.zeros_(weight)
    sampled = settings.decoder_attention == "deformable"
    for name, part in detector.named_modules():
        if isinstance(part, nn.Linear) and "class_head" in name:
            if settings.class_scores == "sigmoid":
                begin_rare(part)
        elif isinstance(part, BoxHead):
            if name.startswith("box_head") and settings.decoder_attention == "dense":
                continue
            of_points = sampled and not settings.two_stage and name in ("box_head", "box_head.0")
            begin_at_reference(part, _FIRST_SIZE_LOGIT if of_points else 0.0)


def _draw(part: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights that this part owns, after those of the parts inside it."""
    match part:
        case Attention():
            nn.init.xavier_uniform_(part.in_proj_weight, generator=generator)
            nn.init.zeros_(part.in_proj_bias)
            nn.init.xavier_uniform_(part.out_proj.weight, generator=generator)
            nn.init.zeros_(part.out_proj.bias)
        case ConditionalSelfAttention() | ConditionalCrossAttention():
            for layer in part.children():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(part.out_proj.bias)
        case ConditionalPositions() | AnchorPositions():
            _draw_matrices(part, generator)
        case Encoder() if part.position_scale is not None:
            _draw_matrices(part.position_scale, generator)
        case FeedForward():
            nn.init.xavier_uniform_(part.widen.weight, generator=generator)
            nn.init.xavier_uniform_(part.narrow.weight, generator=generator)
        case DeformableAttention():
            _draw_sampling(part, generator)
        case InputLevel():
            nn.init.xavier_uniform_(part.convolution.weight, generator=generator)
            assert part.convolution.bias is not None
            nn.init.zeros_(part.convolution.bias)
        case ProposalTokens() | ProposalQueries():
            nn.init.xavier_uniform_(part.projection.weight, generator=generator)
        case TokenScorer():
            for layer in part.layers:
                assert isinstance(layer, nn.Linear)
                nn.init.xavier_uniform_(layer.weight, generator=generator)
        case LearnedPositions():
            nn.init.uniform_(part.rows.weight, generator=generator)
            nn.init.uniform_(part.columns.weight, generator=generator)
        case nn.Linear():
            bound = 1 / math.sqrt(part.in_features)
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        case Swin():
            _draw_swin(part, generator)
        case Dat():
            _draw_dat(part, generator)
        case nn.Conv2d():
            nn.init.kaiming_normal_(
                part.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
        case nn.Embedding():
            nn.init.normal_(part.weight, generator=generator)
        case _:
            pass


def _draw_matrices(part: nn.Module, generator: torch.Generator) -> None:
    """Xavier-uniform; biases stay as they are drawn."""
    for layer in part.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)


def _draw_sampling(part: DeformableAttention, generator: torch.Generator) -> None:
    """Every head looks in a direction of its own, 1, 2, ... cells far (Deformable DETR, A.3).

    The directions are evenly spread and reach the edge of a square; all samples weigh the same.
    """
    turn = torch.arange(part.num_heads) * (2 * math.pi / part.num_heads)
    direction = torch.stack((turn.cos(), turn.sin()), dim=-1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    reach = torch.arange(1, part.num_points + 1)
    offsets = direction[:, None, None, :] * reach[:, None]
    offsets = offsets.expand(-1, part.num_levels, -1, -1)
    nn.init.zeros_(part.sampling_offsets.weight)
    part.sampling_offsets.bias.copy_(offsets.flatten())
    nn.init.zeros_(part.attention_weights.weight)
    nn.init.zeros_(part.attention_weights.bias)
    for projection in (part.value_proj, part.output_proj):
        nn.init.xavier_uniform_(projection.weight, generator=generator)
        nn.init.zeros_(projection.bias)


def _draw_swin(swin: Swin, generator: torch.Generator) -> None:
    """The patch embedding keeps the width of torch's default; its bias is 0 as all others."""
    patches = swin.patch_embedding.projection
    bound = 1 / math.sqrt(patches.weight[0].numel())
    nn.init.uniform_(patches.weight, -bound, bound, generator=generator)
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for part in swin.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        if isinstance(part, WindowAttention):
            nn.init.trunc_normal_(part.relative_position_bias_table, std=0.02, generator=generator)


def _draw_dat(dat: Dat, generator: torch.Generator) -> None:
    for part in dat.modules():
        match part:
            case nn.Linear() | nn.Conv2d():
                bound = 1 / math.sqrt(part.weight[0].numel())
                nn.init.uniform_(part.weight, -bound, bound, generator=generator)
                if part.bias is not None:
                    nn.init.uniform_(part.bias, -bound, bound, generator=generator)
            case WindowAttention():
                table = part.relative_position_bias_table
                nn.init.trunc_normal_(table, std=0.01, generator=generator)
            case DatAttention():
                nn.init.trunc_normal_(part.bias_table, std=0.01, generator=generator)
            case NeighbourhoodAttention():
                nn.init.trunc_normal_(part.bias_table, std=0.02, generator=generator)
            case _:
                pass
