"""Names of a Swin-T's tensors in the files of others, and which of the public forms a file has.

The first public code (microsoft/Swin-Transformer) gave the names that detectors use too, below
`backbone.0.body.` and with a norm for each map; timm has the same, but merges patches at the start
of a stage; torchvision numbers its modules. Those files hold constants besides (which entry of a
bias table a pair of tokens has, which tokens a shift keeps apart), which ours makes itself.
"""

import re
from collections.abc import Callable, Collection
from typing import Literal, assert_never

from torch import Tensor

from models.backbone import BackboneSettings
from models.interop.placing import FileNames
from models.swin import DEPTHS, WINDOW
from models.windows import relative_position_index

SwinForm = Literal["official", "timm", "torchvision"]

NAMES = (
    ("patch_embedding.projection.", "patch_embed.proj."),
    ("patch_embedding.norm.", "patch_embed.norm."),
    ("stages.", "layers."),
    ("norms.1.", "norm1."),
    ("norms.2.", "norm2."),
    ("norms.3.", "norm3."),
)
"""(Ours, official): how a name begins."""

INNER_NAMES = (
    (".attention.projection.", ".attn.proj."),
    (".attention.", ".attn."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.2.", ".mlp.fc2."),
    (".merging.", ".downsample."),
)
"""(Ours, official): parts of a stage."""

TORCHVISION_NAMES = (
    ("patch_embed.proj.", "features.0.0."),
    ("patch_embed.norm.", "features.0.2."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."),
)
"""(Official, torchvision): all but the numbers of stages, which `torchvision_name` makes."""

LEFT_OUT = ("norm.*", "head.*", "*.relative_position_index", "*.attn_mask")
"""The classifier with the norm before it, and constants."""

BODY = "backbone.0.body."
"""What comes before the official names in a detector's file."""

_OFFICIAL_MERGING = re.compile(r"layers\.(\d)\.downsample\.")
_OFFICIAL_BLOCK = re.compile(r"layers\.(\d)\.blocks\.")


def swin_name(ours: str) -> str:
    """The official name of a tensor of a Swin; in detectors' files BODY comes before it."""
    name = _begun_anew(ours, NAMES)
    for part, theirs in INNER_NAMES:
        name = name.replace(part, theirs)
    return name


def our_swin_name(official: str) -> str:
    """The name of an official tensor, without BODY, in a Swin; an unknown name stays."""
    name = _begun_anew(official, [(theirs, ours) for ours, theirs in NAMES])
    for ours, part in INNER_NAMES:
        name = name.replace(part, ours)
    return name


def timm_name(ours: str) -> str:
    """timm's name of a tensor of a Swin."""
    return _OFFICIAL_MERGING.sub(
        lambda found: f"layers.{int(found[1]) + 1}.downsample.", swin_name(ours)
    )


def torchvision_name(ours: str) -> str:
    """torchvision's name of a tensor of a Swin."""
    name = swin_name(ours)
    for part, theirs in TORCHVISION_NAMES:
        name = name.replace(part, theirs)
    name = _OFFICIAL_BLOCK.sub(lambda found: f"features.{2 * int(found[1]) + 1}.", name)
    return _OFFICIAL_MERGING.sub(lambda found: f"features.{2 * int(found[1]) + 2}.", name)


def swin_file(names: Collection[str], num_stages: int) -> FileNames | None:
    """How a file with these names, without BODY, is read for so many stages; None: no Swin."""
    form = _form(names)
    if form is None:
        return None
    new = () if "norm1.weight" in names else ("norms.*",)
    beyond = () if num_stages == len(DEPTHS) else _beyond(form)
    return FileNames(
        name=_naming(form),
        left_out=(*LEFT_OUT, *beyond),
        new=new,
        head="head.fc." if form == "timm" else "head.",
        norm="norm.",
    )


def swin_constants(settings: BackboneSettings) -> dict[str, Tensor]:
    """What official files hold besides the tensors of a Swin of these settings, without BODY."""
    stages = DEPTHS if settings.output == "layer4" else DEPTHS[:-1]
    return {
        f"layers.{stage}.blocks.{block}.attn.relative_position_index": relative_position_index(
            WINDOW
        )
        for stage, depth in enumerate(stages)
        for block in range(depth)
    }


def _begun_anew(name: str, pairs: Collection[tuple[str, str]]) -> str:
    begin, theirs = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
    return theirs + name.removeprefix(begin)


def _form(names: Collection[str]) -> SwinForm | None:
    if "features.1.0.attn.qkv.weight" in names:
        return "torchvision"
    if "layers.0.blocks.0.attn.qkv.weight" not in names:
        return None
    return "official" if "layers.0.downsample.norm.weight" in names else "timm"


def _naming(form: SwinForm) -> Callable[[str], str]:
    match form:
        case "official":
            return swin_name
        case "timm":
            return timm_name
        case "torchvision":
            return torchvision_name
        case _:
            assert_never(form)


def _beyond(form: SwinForm) -> tuple[str, ...]:
    """What a file holds of the fourth stage."""
    match form:
        case "official":
            return ("layers.2.downsample.*", "layers.3.*", "norm3.*")
        case "timm":
            return ("layers.3.*",)
        case "torchvision":
            return ("features.6.*", "features.7.*")
        case _:
            assert_never(form)
