"""The share of some pictures in a whole batch: how sums over them become the batch's means.

A batch is computed in parts, by several workers and by each in one pass or more. What its losses
are divided by is counted beforehand, from the targets alone, so that the losses of the parts add up
to those of one pass over everything.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.structures import Targets


@dataclass(frozen=True)
class Share:
    """What the sums of one part are divided by.

    Losses of a part are `workers` times its sums over the counts of the whole batch: added up over
    the passes of each worker, then averaged over the workers, they are those of the whole batch.
    """

    counts: Float[Tensor, "3"]
    """Of the whole batch: the sum of `counts_of` over all its parts."""
    workers: int = 1

    @property
    def targets(self) -> Float[Tensor, ""]:
        """Targets of the whole batch."""
        return self.counts[0]

    @property
    def matched(self) -> Float[Tensor, ""]:
        """Those of them that get an object query."""
        return self.counts[1]

    @property
    def pictures(self) -> Float[Tensor, ""]:
        """Pictures of the whole batch."""
        return self.counts[2]

    def of_targets(self, value: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """A sum over targets of the part, as its share of the mean over all; at least 1 counts."""
        return value / (self.targets.clamp(min=1) / self.workers)

    def of_pictures(self, value: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """A sum over pictures of the part, as its share of the mean over all."""
        return value / (self.pictures.clamp(min=1) / self.workers)


def counts_of(targets: Targets, num_queries: int, *, blank: bool = False) -> Float[Tensor, "3"]:
    """Targets, those of them that get one of `num_queries` queries, and pictures of one part.

    On the targets' device, which is not waited for. Nothing of a `blank` part counts.
    """
    found = [] if blank else [len(labels) for labels in targets.labels]
    counts = (sum(found), sum(min(count, num_queries) for count in found), len(found))
    like = targets.boxes_cxcywh[0]
    return torch.cat([like.new_full((1,), count, dtype=torch.float32) for count in counts])
