"""Names of a DAT's tensors in the files of its authors (LeapLabTHU/DAT), v1 and DAT++.

Their files hold a whole classifier: its norm is the output norm of our last map. They hold
constants besides (which entry of a bias table a pair of tokens has, which tokens a shift keeps
apart at the one size of training), which ours makes itself. The same three names stand for other
networks before and after September 2023, so the two are told apart by their tensors.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from models.backbone import BackboneSettings
from models.dat import DatName, dat_layout
from models.interop.checkpoint_files import WeightsError
from models.interop.placing import FileNames

NAMES = (
    ("patch_embedding.convolution.projection.", "patch_proj.0."),
    ("patch_embedding.convolution.norm.", "patch_proj.1.norm."),
    ("patch_embedding.first.projection.", "patch_proj.0."),
    ("patch_embedding.first.norm.", "patch_proj.1.norm."),
    ("patch_embedding.second.projection.", "patch_proj.3."),
    ("patch_embedding.second.norm.", "patch_proj.4.norm."),
)
"""(Ours, official): how a name begins."""

ATTENTION_NAMES = {
    "window": {"qkv": "proj_qkv", "projection": "proj_out"},
    "shifted window": {"qkv": "proj_qkv", "projection": "proj_out"},
    "deformable": {
        "query": "proj_q",
        "key": "proj_k",
        "value": "proj_v",
        "projection": "proj_out",
        "bias_table": "rpe_table",
        "offsets.convolution": "conv_offset.0",
        "offsets.norm": "conv_offset.1.norm",
        "offsets.offset": "conv_offset.3",
    },
    "neighbourhood": {"projection": "proj", "bias_table": "rpb"},
}
"""Ours to official, inside an attention of a kind; other names are the same."""

MLP_NAMES = {"0": "chunk.linear1", "3": "chunk.linear2"}
PLUS_PLUS_MLP_NAMES = {"0": "linear1.0", "1.convolution": "dwc", "3": "linear2.0"}

LEFT_OUT = ("cls_norm.*", "cls_head.*", "*.relative_position_index", "*.attn_mask")
"""The classifier with the norm before it, and constants."""

_BLOCK = re.compile(r"stages\.(\d)\.blocks\.(\d+)\.(\w+)\.(.+)")
_MERGING = re.compile(r"stages\.(\d)\.merging\.(projection|norm)\.(\w+)")
_STEM = "patch_proj.0.weight"
_SECOND_OF_STEM = "patch_proj.3.weight"
_FIRST_TABLE = "stages.0.attns.0.relative_position_bias_table"
_FIRST_PLUS_PLUS_TABLE = "stages.0.attns.1.rpe_table"


def is_dat(names: Mapping[str, Tensor]) -> bool:
    """Whether a file with these tensors is one of DAT's authors."""
    return _STEM in names and "stages.0.layer_norms.0.norm.weight" in names


def dat_file(
    settings: BackboneSettings, name: DatName, tensors: Mapping[str, Tensor], source: str
) -> FileNames:
    """How a file of DAT's authors names the tensors of a DAT; WeightsError where it is another's.

    The output norms of maps other than a classifier's last are in no such file.
    """
    _check_version(name, tensors, source)
    _check_size(settings, tensors, source)
    beyond = ("stages.3.*", "down_projs.2.*") if settings.output == "layer3" else ()
    return FileNames(
        name=lambda ours: dat_name(ours, name),
        left_out=(*LEFT_OUT, *beyond),
        new=("norms.*",),
        head="cls_head.",
        norm="cls_norm.norm.",
    )


def dat_name(ours: str, name: DatName) -> str:
    """The official name of a tensor of a DAT; output norms, which have none, stay."""
    for begin, theirs in NAMES:
        if ours.startswith(begin):
            return theirs + ours.removeprefix(begin)
    if found := _MERGING.fullmatch(ours):
        part = "0" if found[2] == "projection" else "1.norm"
        return f"down_projs.{found[1]}.{part}.{found[3]}"
    if found := _BLOCK.fullmatch(ours):
        return _in_a_block(name, int(found[1]), int(found[2]), found[3], found[4])
    return ours


def _in_a_block(name: DatName, stage: int, block: int, part: str, rest: str) -> str:
    layout = dat_layout(name)
    begin = f"stages.{stage}"
    match part:
        case "norm1" | "norm2":
            number = 2 * block + (part == "norm2")
            return f"{begin}.layer_norms.{number}.norm.{rest}"
        case "local_perception":
            return f"{begin}.local_perception_units.{block}.{rest.removeprefix('convolution.')}"
        case "mlp":
            names = PLUS_PLUS_MLP_NAMES if layout.is_plus_plus else MLP_NAMES
            return f"{begin}.mlps.{block}.{_renamed(rest, names)}"
        case _:
            names = ATTENTION_NAMES[layout.attention[stage][block % 2]]
            return f"{begin}.attns.{block}.{_renamed(rest, names)}"


def _renamed(rest: str, names: Mapping[str, str]) -> str:
    """Either the whole or what comes before the last point."""
    if rest in names:
        return names[rest]
    inner, _, last = rest.rpartition(".")
    return f"{names.get(inner, inner)}.{last}" if inner else last


def _check_version(name: DatName, tensors: Mapping[str, Tensor], source: str) -> None:
    file_is_plus_plus = _SECOND_OF_STEM in tensors
    if file_is_plus_plus != dat_layout(name).is_plus_plus:
        found = "a DAT++" if file_is_plus_plus else "a DAT of CVPR 2022"
        names = "dat_pp_t, dat_pp_s or dat_pp_b" if file_is_plus_plus else "dat_t, dat_s or dat_b"
        raise WeightsError(
            f"{source} holds {found}, and backbone.name={name}; say name={names}: its authors call "
            "both by the same names"
        )


def _check_size(settings: BackboneSettings, tensors: Mapping[str, Tensor], source: str) -> None:
    """By the first table: (2 * window - 1)^2 rows in v1, 2 * cells - 1 along an axis in DAT++."""
    if _FIRST_TABLE in tensors:
        size = 32 * (math.isqrt(tensors[_FIRST_TABLE].shape[0]) + 1) // 2
    elif _FIRST_PLUS_PLUS_TABLE in tensors:
        size = 4 * (tensors[_FIRST_PLUS_PLUS_TABLE].shape[-1] + 1) // 2
    else:
        return
    if size != settings.trained_size:
        raise WeightsError(
            f"{source} was trained with pictures of {size} pixels, and backbone.trained_size="
            f"{settings.trained_size}; say trained_size={size}"
        )
