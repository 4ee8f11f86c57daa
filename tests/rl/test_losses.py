"""The clipped losses by value and gradient: at ratio 1, inside the clip range and outside of it."""

import math

import pytest
import torch

from rlkl.rl import clipped_policy_loss, clipped_value_loss

EPS = 0.2


def policy_gradient(log_ratio: float, advantage: float) -> tuple[float, float]:
    logp = torch.tensor([-1.0 + log_ratio], requires_grad=True)
    loss = clipped_policy_loss(logp, torch.tensor([-1.0]), torch.tensor([advantage]), EPS)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    return loss.item(), gradient.item()


@pytest.mark.parametrize("advantage", [2.0, -3.0, 0.0])
def test_at_ratio_one_the_gradient_is_minus_the_advantage(advantage):
    loss, gradient = policy_gradient(0.0, advantage)
    assert loss == pytest.approx(-advantage)
    assert gradient == pytest.approx(-advantage)


def test_at_ratio_one_the_gradient_in_the_parameters_is_minus_advantage_times_grad_logp():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens, advantages = torch.tensor([0, 3, 1]), torch.tensor([1.0, -2.0, 0.5])
    logp = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    (scores,) = torch.autograd.grad((advantages * logp).sum(), logits, retain_graph=True)
    loss = clipped_policy_loss(logp, logp, advantages, EPS)  # π_old is π: it must be detached
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, -scores)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.3, 1.0), (0.7, -1.0)])
def test_nothing_pulls_once_the_ratio_has_gone_where_the_advantage_wants_it(ratio, advantage):
    loss, gradient = policy_gradient(math.log(ratio), advantage)
    bound = 1 + EPS if ratio > 1 else 1 - EPS
    assert loss == pytest.approx(-bound * advantage)
    assert gradient == 0


@pytest.mark.parametrize(("ratio", "advantage"), [(1.3, -1.0), (0.7, 1.0), (1.1, 1.0), (0.9, -2.0)])
def test_the_gradient_stays_where_the_ratio_is_inside_or_went_the_wrong_way(ratio, advantage):
    loss, gradient = policy_gradient(math.log(ratio), advantage)
    assert loss == pytest.approx(-ratio * advantage)
    assert gradient == pytest.approx(-ratio * advantage)


def test_advantages_and_old_logp_are_constants():
    leaves = [torch.tensor([x], requires_grad=True) for x in (-1.0, -1.1, 2.0)]
    clipped_policy_loss(*leaves, EPS).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None


def value_gradient(value: float, old: float, target: float) -> tuple[float, float]:
    values = torch.tensor([value], requires_grad=True)
    loss = clipped_value_loss(values, torch.tensor([old]), torch.tensor([target]), EPS)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    return loss.item(), gradient.item()


def test_the_value_loss_is_half_the_squared_error_near_the_old_value():
    loss, gradient = value_gradient(1.1, 1.0, 3.0)
    assert loss == pytest.approx(0.5 * 1.9**2)
    assert gradient == pytest.approx(-1.9)


def test_the_value_stops_once_it_has_gone_its_range_towards_the_return():
    loss, gradient = value_gradient(1.5, 1.0, 3.0)
    assert loss == pytest.approx(0.5 * 1.8**2)
    assert gradient == 0


def test_the_value_is_pulled_back_when_it_went_away_from_the_return():
    loss, gradient = value_gradient(0.5, 1.0, 3.0)
    assert loss == pytest.approx(0.5 * 2.5**2)
    assert gradient == pytest.approx(-2.5)


def test_returns_and_old_values_are_constants():
    leaves = [torch.tensor([x], requires_grad=True) for x in (1.0, 1.1, 2.0)]
    clipped_value_loss(*leaves, EPS).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None
