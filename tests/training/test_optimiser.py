"""Parameter groups, updates by hand, and the moving average."""

import copy

import pytest
import torch
from torch import nn

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.sampling_parts import sampling_parts
from tests.training.small import DropoutLine
from training.ema import Ema, EmaSettings
from training.optimiser import (
    OptimiserSettings,
    build_optimiser,
    clip_gradients,
    gradient_norm,
    load_optimiser_state,
    set_learning_rates,
    trainable_parameters,
)
from training.schedule import ScheduleSettings, schedule_in_steps


class Joined(nn.Module):
    """As in DETR: the position codes lie in a module named backbone, beside the CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([nn.Linear(2, 3), nn.Embedding(5, 3)])
        self.head = nn.Linear(3, 1)


def grouped_names(model: nn.Module, optimiser: torch.optim.AdamW) -> dict[str, list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in optimiser.param_groups}


def test_learned_position_codes_are_not_in_the_backbone_group() -> None:
    model = Joined()
    optimiser = build_optimiser(model, model.backbone[0], OptimiserSettings(lr=3e-4))
    assert grouped_names(model, optimiser) == {
        "backbone": ["backbone.0.weight", "backbone.0.bias"],
        "rest": ["backbone.1.weight", "head.weight", "head.bias"],
    }
    assert [group["lr"] for group in optimiser.param_groups] == [1e-5, 3e-4]


def deformable_detector(**given: object) -> Detector:
    said = {
        "encoder_attention": "deformable", "decoder_attention": "deformable", "feature_levels": 2,
        "encoder_layers": 2, "box_refinement": True, "backbone": {"name": "resnet18"},
        "hidden_dim": 32, "num_heads": 4, "feedforward_dim": 8, "num_classes": 3, "num_queries": 5,
    }  # fmt: skip
    settings = DetectorSettings.model_validate(said | given)
    return Detector(settings, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("two_stage", [False, True])
def test_what_says_where_to_sample_has_its_own_rate(two_stage: bool) -> None:
    """Deformable DETR's groups: 2e-4, 2e-5 and 2e-5; two-stage has no learned reference points."""
    model = deformable_detector(two_stage=two_stage, decoder_layers=3)
    settings = OptimiserSettings(lr=2e-4, backbone_lr=2e-5, sampling_lr=2e-5)
    optimiser = build_optimiser(model, model.backbone, settings, sampling_parts(model))
    names = grouped_names(model, optimiser)
    offsets = [f"encoder.layers.{n}.self_attention.sampling_offsets" for n in range(2)]
    offsets += [f"decoder.layers.{n}.cross_attention.sampling_offsets" for n in range(3)]
    wanted = [*offsets, *([] if two_stage else ["reference_points"])]
    assert set(names["sampling"]) == {
        f"{module}.{kind}" for module in wanted for kind in ("weight", "bias")
    }
    assert not any(name.startswith("backbone.") for name in names["rest"])
    rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
    assert rates == {"rest": 2e-4, "sampling": 2e-5}
    assert {group["weight_decay"] for group in optimiser.param_groups} == {1e-4}


def test_without_a_rate_of_its_own_it_learns_with_the_rest() -> None:
    model = deformable_detector()
    one = build_optimiser(model, None, OptimiserSettings(), sampling_parts(model))
    assert [group["name"] for group in one.param_groups] == ["rest"]


def test_a_dense_detector_has_nothing_that_samples_and_its_old_states_load() -> None:
    dense = {"encoder_attention": "dense", "decoder_attention": "dense", "feature_levels": 1}
    model = deformable_detector(**dense, box_refinement=False)
    assert sampling_parts(model) == ()
    before = build_optimiser(model, None, OptimiserSettings())
    ours = build_optimiser(model, None, OptimiserSettings(sampling_lr=1e-5), sampling_parts(model))
    load_optimiser_state(ours, before.state_dict())
    assert grouped_names(model, ours) == grouped_names(model, before)


def test_frozen_parameters_are_in_no_group() -> None:
    model = Joined()
    model.backbone[0].requires_grad_(False)
    optimiser = build_optimiser(model, model.backbone[0], OptimiserSettings())
    assert grouped_names(model, optimiser) == {
        "rest": ["backbone.1.weight", "head.weight", "head.bias"]
    }
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimiser(model.requires_grad_(False), None, OptimiserSettings())


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.999)])
def test_betas_outside_of_zero_to_one_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"Input should be (less|greater) than"):
        OptimiserSettings(betas=betas)


def test_a_backbone_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not a part of the model"):
        build_optimiser(Joined(), nn.Linear(2, 3), OptimiserSettings())


def test_every_group_follows_the_schedule_from_its_own_rate() -> None:
    model = Joined()
    optimiser = build_optimiser(
        model, model.backbone[0], OptimiserSettings(lr=1.0, backbone_lr=0.5)
    )
    schedule = schedule_in_steps(ScheduleSettings(drop_at=(2,), unit="steps"), 4, 1.0)
    assert set_learning_rates(optimiser, schedule, 1) == {"backbone": 0.5, "rest": 1.0}
    assert set_learning_rates(optimiser, schedule, 2) == pytest.approx(
        {"backbone": 0.05, "rest": 0.1}
    )


def test_an_update_is_adamw_by_hand_with_decay_on_biases_too() -> None:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    nn.init.constant_(model.bias, 1.0)
    optimiser = build_optimiser(model, None, OptimiserSettings(lr=0.1, weight_decay=0.5))
    model(torch.tensor([[3.0]])).sum().backward()
    optimiser.step()
    # First AdamW step: p * (1 - lr * decay) - lr * sign(gradient).
    assert model.weight.item() == pytest.approx(2.0 * 0.95 - 0.1, abs=1e-6)
    assert model.bias.item() == pytest.approx(1.0 * 0.95 - 0.1, abs=1e-6)


def test_gradients_are_scaled_to_the_norm_only_when_longer() -> None:
    model = nn.Linear(2, 1, bias=False)
    parameters = list(model.parameters())
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = gradient_norm(parameters)
    assert norm.item() == 5.0
    clip_gradients(parameters, norm, None)
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    clip_gradients(parameters, norm, 0.1)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.06, 0.08]]), atol=1e-6, rtol=0)


def test_loaded_state_keeps_moments_and_obeys_the_present_recipe() -> None:
    model = DropoutLine()
    first = build_optimiser(model, None, OptimiserSettings(lr=0.1))
    model(torch.ones(2, 4)).sum().backward()
    first.step()
    second = build_optimiser(model, None, OptimiserSettings(lr=0.2, weight_decay=0.3))
    load_optimiser_state(second, first.state_dict())
    assert second.param_groups[0]["lr"] == 0.2
    assert second.param_groups[0]["weight_decay"] == 0.3
    for parameter in trainable_parameters(first):
        for name, value in first.state[parameter].items():
            torch.testing.assert_close(second.state[parameter][name], value, rtol=0, atol=0)


def test_state_of_another_model_is_refused_by_name() -> None:
    theirs = build_optimiser(Joined(), None, OptimiserSettings())
    ours = build_optimiser(DropoutLine(), None, OptimiserSettings())
    with pytest.raises(
        ValueError, match=r"5 parameters, not 4, first difference backbone\.0\.bias"
    ):
        load_optimiser_state(ours, theirs.state_dict())
    with pytest.raises(ValueError, match="holds no param_groups"):
        load_optimiser_state(ours, {"state": {}, "param_groups": None})


def test_the_average_moves_by_its_decay_and_shares_what_is_frozen() -> None:
    live = DropoutLine()
    live.backbone.requires_grad_(False)
    start = copy.deepcopy(live.head.weight)
    ema = Ema(live, EmaSettings(decay=0.3))
    assert ema.model.backbone.weight is live.backbone.weight
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        live.head.weight.add_(1.0)
    ema.update(step=0)  # (1 + 0) / (10 + 0) = 0.1 stays
    torch.testing.assert_close(ema.model.head.weight, start + 0.9)
    ema.update(step=100)  # 0.3 stays
    torch.testing.assert_close(ema.model.head.weight, start + 0.97)
    assert live.head.weight.requires_grad


def test_an_average_of_another_model_is_refused() -> None:
    ema = Ema(DropoutLine(), EmaSettings())
    with pytest.raises(ValueError, match=r"another model, first difference backbone\.bias"):
        ema.load({})
