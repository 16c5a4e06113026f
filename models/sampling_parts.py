"""The parts of a model that say where deformable attention looks (Deformable DETR, A.4).

They learn at a tenth of the rate of the rest: what a sample brings hardly changes where it is, so
that large steps lose it. They are found by what they are, not by a word in a parameter's name.
"""

from torch import nn

from models.deformable_attention import DeformableAttention
from models.detector import Detector


def sampling_parts(model: nn.Module) -> tuple[nn.Module, ...]:
    """Projections to sampling offsets, and to the reference points of learned queries."""
    found: list[nn.Module] = []
    for part in model.modules():
        match part:
            case DeformableAttention():
                found.append(part.sampling_offsets)
            case Detector() if part.settings.decoder_attention == "deformable":
                if part.reference_points is not None:
                    found.append(part.reference_points)
            case _:
                pass
    return tuple(found)
