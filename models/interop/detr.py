"""Checkpoints with the tensor names of facebookresearch/detr and dddzg/up-detr, in and out.

Pretraining files hold `patch2query` and, with reconstruction, `feature_align` besides the detector;
finetuned files and DETR's own do not. Pre-norm is told by `transformer.encoder.norm`. Heads and
dilation leave no trace in the tensors.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.backbone import BackboneSettings, is_resnet
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.placing import LoadReport, place_tensors
from models.patch_queries import PatchDetector
from models.position import TEMPERATURE
from models.resnet import ResNetName

NAMES = (
    ("backbone.body.", "backbone.0.body."),
    ("learned_positions.rows.", "backbone.1.row_embed."),
    ("learned_positions.columns.", "backbone.1.col_embed."),
    ("input_projection.", "input_proj."),
    ("encoder.", "transformer.encoder."),
    ("decoder.", "transformer.decoder."),
    ("queries.", "query_embed."),
    ("class_head.", "class_embed."),
    ("box_head.", "bbox_embed."),
    ("patch_projection.", "patch2query."),
    ("reconstruction.", "feature_align."),
)
"""(Ours, theirs): how a name begins."""

INNER_NAMES = (
    (".self_attention.", ".self_attn."),
    (".cross_attention.", ".multihead_attn."),
    (".feedforward.widen.", ".linear1."),
    (".feedforward.narrow.", ".linear2."),
)
"""(Ours, theirs): parts of a transformer layer."""

PRETRAINING_ONLY = ("patch2query.*", "feature_align.*")
"""What a detector without patches has no use for."""

_LINEAR_IN_NAME = "input_proj.weight"


def beyond_others(settings: DetectorSettings) -> tuple[tuple[bool, str], ...]:
    """What only DAB-DETR's public code can hold: whether a detector has it, and its key."""
    temperature = settings.position_temperature
    return (
        (settings.activation == "prelu", "activation=prelu"),
        (settings.scale_positions, "scale_positions=true"),
        (temperature != TEMPERATURE, f"position_temperature={temperature:g}"),
    )


def refuse_nameless(settings: DetectorSettings) -> None:
    """WeightsError for a dense detector that DETR's code cannot hold."""
    lacking = (
        (settings.rho is not None, f"rho={settings.rho} with dense attention"),
        (settings.class_scores == "sigmoid", "class_scores=sigmoid with dense attention"),
        (
            not is_resnet(settings.backbone.name),
            f"backbone.name={settings.backbone.name} with dense attention",
        ),
        *((is_so, f"{what} with dense attention") for is_so, what in beyond_others(settings)),
    )
    for is_so, what in lacking:
        if is_so:
            raise WeightsError(f"{what} is no public architecture; export with format querypatch")


def detr_name(ours: str) -> str:
    """The public name of a tensor of a Detector or PatchDetector."""
    name = ours.removeprefix("detector.")
    for begin, theirs in NAMES:
        if name.startswith(begin):
            name = theirs + name.removeprefix(begin)
            break
    for part, theirs in INNER_NAMES:
        name = name.replace(part, theirs)
    return name


def our_name(theirs: str) -> str:
    """The name of a public tensor in a Detector, or beside one; an unknown name stays."""
    found = [pair for pair in NAMES if theirs.startswith(pair[1])]
    if not found:
        return theirs
    ((begin, public),) = found
    name = begin + theirs.removeprefix(public)
    for ours, part in INNER_NAMES:
        name = name.replace(part, ours)
    return name


def load_detr(
    model: Detector | PatchDetector,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    new: Sequence[str] = (),
) -> LoadReport:
    """Fill a model from public tensors (`read_tensors`), strictly.

    `new` are shell patterns of our names that keep their random values, e.g. `class_head.*` for
    other classes. Tensors that only pretraining uses are left out where the model has no place for
    them. WeightsError lists all misfits.
    """
    return place_tensors(
        model,
        tensors,
        file_name=detr_name,
        left_out=(*PRETRAINING_ONLY, *(map(detr_name, new)), "*.num_batches_tracked"),
        new=new,
        source=source,
    )


def to_detr_names(model: Detector | PatchDetector) -> dict[str, Tensor]:
    """The model's tensors as the public code names and shapes them, float32, on the CPU."""
    exported = {
        detr_name(ours): tensor.detach().float().cpu().clone()
        for ours, tensor in model.state_dict().items()
    }
    exported[_LINEAR_IN_NAME] = exported[_LINEAR_IN_NAME][:, :, None, None]
    return exported


def detr_settings(
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    num_heads: int = 8,
    dilation: bool = False,
    train_backbone: bool = False,
) -> DetectorSettings:
    """The architecture that public tensors belong to; what they cannot tell is given.

    WeightsError where they are not those of a DETR with a ResNet.
    """
    needed = ("query_embed.weight", "class_embed.weight", "transformer.decoder.norm.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise WeightsError(
            f"{source} is no DETR checkpoint: {', '.join(missing)} missing; "
            "give one of DETR or UP-DETR"
        )
    num_queries, hidden_dim = tensors["query_embed.weight"].shape
    if not count_layers(tensors, "transformer.decoder.layers.{}.norm1.weight"):
        raise WeightsError(f"{source} has no decoder layer; it is cut, or not of DETR")
    return DetectorSettings(
        backbone=BackboneSettings(
            name=resnet_name(tensors, source),
            dilation=dilation,
            output="layer4" if "backbone.0.body.layer4.0.conv1.weight" in tensors else "layer3",
            weights=source,
            train=train_backbone,
        ),
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        encoder_layers=count_layers(tensors, "transformer.encoder.layers.{}.norm1.weight"),
        decoder_layers=count_layers(tensors, "transformer.decoder.layers.{}.norm1.weight"),
        feedforward_dim=len(tensors["transformer.decoder.layers.0.linear1.weight"]),
        pre_norm="transformer.encoder.norm.weight" in tensors,
        position="learned" if "backbone.1.row_embed.weight" in tensors else "sine",
        num_queries=num_queries,
        num_classes=len(tensors["class_embed.weight"]) - 1,
    )


def resnet_name(tensors: Mapping[str, Tensor], source: str) -> ResNetName:
    """Which ResNet a public detector's tensors hold; WeightsError where it is none.

    Told by the number of blocks of two stages and by whether blocks have a third convolution.
    """
    blocks = (
        count_layers(tensors, "backbone.0.body.layer1.{}.conv1.weight"),
        count_layers(tensors, "backbone.0.body.layer3.{}.conv1.weight"),
    )
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in tensors
    match bottleneck, blocks:
        case False, (2, 2):
            return "resnet18"
        case False, (3, 6):
            return "resnet34"
        case True, (3, 6):
            return "resnet50"
        case True, (3, 23):
            return "resnet101"
        case _:
            raise WeightsError(
                f"{source} has a backbone of {blocks[0]} blocks in layer1 and {blocks[1]} in "
                "layer3, no ResNet-18, 34, 50 or 101; give a checkpoint with one of them"
            )


def count_layers(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many layers there are, counting up from 0 until one is missing; `name` has a {}."""
    count = 0
    while name.format(count) in tensors:
        count += 1
    return count
