"""Sigmoid focal loss, by hand."""

import math

import torch

from models.focal import focal_costs, focal_losses

LOGITS = torch.tensor([0.0, 0.0, math.log(3), math.log(3)])
WANTED = torch.tensor([True, False, True, False])
"""Probabilities 1/2 and 3/4, of what is there and of what is not."""


def test_equation_5_of_the_focal_loss_weighs_what_is_wrong_by_its_square() -> None:
    """0.25 (1 - p)^2 -log p of what is there, 0.75 p^2 -log(1 - p) of what is not."""
    losses = focal_losses(LOGITS, WANTED, alpha=0.25, gamma=2.0)
    torch.testing.assert_close(losses, torch.tensor([0.0433217, 0.1299651, 0.0044950, 0.5848429]))


def test_alpha_and_gamma_are_those_that_are_given() -> None:
    """0.1 (1 - p)^3 -log p and 0.9 p^3 -log(1 - p)."""
    losses = focal_losses(LOGITS, WANTED, alpha=0.1, gamma=3.0)
    torch.testing.assert_close(losses, torch.tensor([0.0086643, 0.0779791, 0.0004495, 0.5263586]))


def test_the_matching_cost_of_deformable_detr_is_yes_less_no() -> None:
    costs = focal_costs(torch.tensor([0.0, math.log(3)]))
    torch.testing.assert_close(costs, torch.tensor([-0.0866434, -0.5803479]))


def test_the_cost_of_a_certain_answer_is_bound_by_1e_8_in_the_logarithm() -> None:
    """-0.75 log(1e-8) and 0.25 log(1e-8): an infinite cost would match nothing."""
    costs = focal_costs(torch.tensor([200.0, -200.0]))
    torch.testing.assert_close(costs, torch.tensor([-13.8155106, 4.6051702]))


def test_the_loss_of_a_certain_mistake_and_its_gradient_are_finite() -> None:
    logits = torch.tensor([300.0, -300.0, 300.0, -300.0], requires_grad=True)
    losses = focal_losses(logits, torch.tensor([False, True, True, False]), 0.25, 2.0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist() == [225.0, 75.0, 0.0, 0.0]
    assert gradient.tolist() == [0.75, -0.25, 0.0, 0.0]
