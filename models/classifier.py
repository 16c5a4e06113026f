"""A backbone with its classification head: the network that ImageNet weights were trained as.

The head is a linear layer on the mean of the last map. A ResNet's map goes in as it is (He et al.,
CVPR 2016, section 3.3), that of a transformer through its output LayerNorm, which is the norm
before the classifier in public files (Liu et al., ICCV 2021, section 3.1). So what is trained here
is a backbone of detectors with all but the norms of its other maps.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backbone import Backbone, BackboneSettings
from models.initialise import initialise
from models.swin import Swin

_SWIN_DEVIATION = 0.02


class Classifier(nn.Module):
    """Pictures to the logits of classes; `settings.train=false` leaves the head alone trained.

    All of the backbone is trained otherwise, but BatchNorms: they are constants, so a ResNet goes
    on from weights. Weights are drawn from `generator`.
    """

    def __init__(
        self, settings: BackboneSettings, num_classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} leaves nothing to choose; give 2 or more")
        self.backbone = Backbone(settings, num_levels=1, use="classifier")
        self.head = nn.Linear(self.backbone.channels, num_classes)
        initialise(self, generator)
        if isinstance(self.backbone.body, Swin):
            with torch.no_grad():
                nn.init.trunc_normal_(self.head.weight, std=_SWIN_DEVIATION, generator=generator)
                nn.init.zeros_(self.head.bias)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of normalised pictures of one size, none of them padded."""
        features = self.backbone(pixels)
        logits: Tensor = self.head(features.mean((2, 3)).to(self.head.weight.dtype))
        return logits
