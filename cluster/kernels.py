"""Whether a run's devices have the kernels that its detector asks for.

Plain PyTorch is far slower on a GPU: a run that would fall back to it without having been told
to (`ops.allow_reference=true`) is refused, in preflight where this machine can tell, and by every
worker before it begins.
"""

import torch

from cluster.stages import Recipe
from models.detector_settings import DetectorSettings
from models.ops.self_check import sampled_once


class NoKernels(ValueError):  # noqa: N818
    """A device without compiled deformable attention; the message names the way out."""


def check_kernels(recipe: Recipe, device: torch.device) -> None:
    """Raises NoKernels where the recipe's detector samples, on a GPU that has no kernels for it.

    Without effect on other devices and where `ops.allow_reference` says so.
    """
    if device.type != "cuda" or recipe.ops.allow_reference or not _samples(recipe.model):
        return
    try:
        sampled_once(device)
    except RuntimeError as error:
        raise NoKernels(str(error)) from None


def _samples(settings: DetectorSettings) -> bool:
    return "deformable" in (settings.encoder_attention, settings.decoder_attention)
