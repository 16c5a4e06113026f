"""AdamW in named groups: the backbone and the rest (DETR, section 4; UP-DETR, section 4.1).

Deformable DETR adds a third, of what says where to sample (A.4, `models.sampling_parts`). Weight
decay covers every trainable tensor, biases and norms included, as in the public code, which finds
the backbone by a word in the parameter's name and so freezes learned position codes with it; here
all groups are modules.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW

from models.settings import Settings
from training.schedule import Schedule, learning_rate

_TABLE = "bias_table"
"""What the tables of relative positions of Swin and DAT are called at the end of their names."""

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimiserSettings(Settings):
    """AdamW and the clipping of its gradients."""

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate of everything that has no rate of its own."""
    backbone_lr: float = Field(default=1e-5, gt=0)
    """Learning rate of the backbone; without effect where it is frozen."""
    sampling_lr: float | None = Field(default=None, gt=0)
    """Learning rate of sampling offsets and reference points (Deformable DETR: a tenth of lr); null
    takes lr, and without deformable attention it has no effect.
    """
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay of every trainable tensor, or of those that `decay` says."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: everything (DETR), or all but biases, norms and tables of relative positions, as
    Swin and DAT are trained.
    """
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""
    clip_norm: float | None = Field(default=0.1, gt=0)
    """Gradients are scaled down to this total norm; null never scales."""


def build_optimiser(
    model: nn.Module,
    backbone: nn.Module | None,
    settings: OptimiserSettings,
    sampling: Sequence[nn.Module] = (),
) -> AdamW:
    """AdamW over the trainable parameters, in the groups "backbone", "rest" and "sampling".

    A group is there where it has a parameter: "sampling", of the modules given by that name, where
    they have a rate of their own.

    Raises:
        ValueError: nothing is trainable, or a module given is not a part of `model`.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter; unfreeze a part of it")
    known = {id(p) for _, p in trainable}
    of_backbone = _identities("backbone", () if backbone is None else (backbone,), known)
    of_sampling = _identities("sampling parts", sampling, known)
    rates = {"backbone": settings.backbone_lr, "rest": settings.lr}
    if settings.sampling_lr is None:
        of_sampling = set()
    else:
        rates["sampling"] = settings.sampling_lr

    def group_of(parameter: nn.Parameter) -> str:
        if id(parameter) in of_backbone:
            return "backbone"
        return "sampling" if id(parameter) in of_sampling else "rest"

    groups = [
        _group(group, [(name, p) for name, p in trainable if group_of(p) == group], rate)
        for group, rate in rates.items()
    ]
    if settings.decay == "matrices":
        groups = [part for group in groups for part in _by_decay(group)]
    return AdamW(
        [group for group in groups if group["params"]],
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=all(p.device.type in ("cpu", "cuda") for _, p in trainable),
    )


def set_learning_rates(optimiser: AdamW, schedule: Schedule, step: int) -> dict[str, float]:
    """Gives every group its rate for update number `step`; returns the rates by group name."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(schedule, group["base_lr"], step)
    return {group["name"]: group["lr"] for group in optimiser.param_groups}


def load_optimiser_state(optimiser: AdamW, state: Mapping[str, object]) -> None:
    """Takes over moments and step counts; rates, decay and betas stay as the recipe says.

    Raises:
        ValueError: the state is of other parameters; the first one that differs is named.
    """
    ours = optimiser.state_dict()
    _check_same_parameters(_names(ours["param_groups"]), _names(state["param_groups"]))
    optimiser.load_state_dict({"state": state["state"], "param_groups": ours["param_groups"]})


def trainable_parameters(optimiser: AdamW) -> list[nn.Parameter]:
    """The parameters of all groups, in order."""
    return [p for group in optimiser.param_groups for p in group["params"]]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The 2-norm of all gradients together, on their device and not yet read."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(
    parameters: list[nn.Parameter], norm: Float[Tensor, ""], clip_norm: float | None
) -> None:
    """Scales the gradients, whose total norm is `norm`, down to `clip_norm`."""
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)


def _identities(what: str, modules: Sequence[nn.Module], known: set[int]) -> set[int]:
    found = {id(p) for module in modules for p in module.parameters() if p.requires_grad}
    if not found <= known:
        raise ValueError(f"the {what} given to the optimiser are not a part of the model")
    return found


def _group(name: str, params: list[tuple[str, nn.Parameter]], base_lr: float) -> dict[str, Any]:
    return {"name": name, "params": params, "lr": base_lr, "base_lr": base_lr}


def _by_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group without what never decays, and that as a group `NAME_undecayed`."""
    decays = [(name, p) for name, p in group["params"] if _decays(name, p)]
    others = [(name, p) for name, p in group["params"] if not _decays(name, p)]
    undecayed = {"name": f"{group['name']}_undecayed", "params": others, "weight_decay": 0.0}
    return [{**group, "params": decays}, {**group, **undecayed}]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not name.endswith(_TABLE)


def _names(groups: object) -> list[str]:
    if not isinstance(groups, list):
        raise ValueError("the optimiser state holds no param_groups; it is not one of ours")
    return [name for group in groups for name in group.get("param_names", ())]


def _check_same_parameters(ours: list[str], theirs: list[str]) -> None:
    if ours == theirs:
        return
    differing = sorted(set(ours) ^ set(theirs)) or ["their order"]
    raise ValueError(
        f"the optimiser state is of another model: {len(theirs)} parameters, not {len(ours)}, "
        f"first difference {differing[0]}; resume with the recipe of the run, or start with init="
    )
