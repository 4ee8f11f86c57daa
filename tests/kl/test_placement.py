"""The surrogate's gradient against its definition, and the variance of its forms by enumeration."""

import pytest
import torch
from torch import Tensor

from rlkl.kl import (
    KLPlacement,
    exact_gradient,
    future_kl,
    get_estimator,
    gradient_moments,
    kl_rewards,
    kl_surrogate,
    surrogate_moments,
)

K = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
own_token_or_not = pytest.mark.parametrize("own_token", [True, False])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# --- the forms of the gradient, as in the published table ---------------------------------------


def weighted(form: str, policy, ref):
    """Moments of Σ_t g_t · weight_t + Σ_t ∇D_t, with a weight that rlkl does not use."""

    def surrogate(policy_logp: Tensor) -> Tensor:
        d = get_estimator("rb")(policy_logp, ref.policy_logp(), policy.tokens, policy.mask)
        token_logp = policy_logp.gather(-1, policy.tokens.unsqueeze(-1)).squeeze(-1)
        weight = {
            "whole sequence": d.sum(1, keepdim=True).expand_as(d),
            "own token kept": future_kl(d, policy.mask, own_token=True),
        }[form]
        score = torch.where(policy.mask, token_logp * weight.detach(), 0.0)
        return (score + d).sum(1)

    return surrogate_moments(policy, surrogate)


def test_shifted_rb_gradient_is_exact_and_varies_less_than_every_other_exact_form(pair):
    k1 = gradient_moments(*pair, get_estimator("k1"), "reward")
    published = weighted("whole sequence", *pair)
    unshifted = weighted("own token kept", *pair)
    shifted = gradient_moments(*pair, get_estimator("rb"), "both")
    for form in (k1, published, unshifted, shifted):
        assert relative_error(form.mean, exact_gradient(*pair)) < 1e-12
    assert shifted.variance < unshifted.variance < min(k1.variance, published.variance)
    assert shifted.variance < 0.6 * k1.variance


def test_rb_in_reward_only_misses_the_own_token_gradient(pair):
    mean = gradient_moments(*pair, get_estimator("rb"), "reward").mean
    assert 0.5 < relative_error(mean, exact_gradient(*pair)) < 1.5


def test_rb_in_loss_only_misses_the_future(pair):
    mean = gradient_moments(*pair, get_estimator("rb"), "loss").mean
    assert 0.1 < relative_error(mean, exact_gradient(*pair)) < 1


def test_k1_differentiated_has_zero_expected_gradient_but_not_zero_variance(pair):
    mean, variance = gradient_moments(*pair, get_estimator("k1"), "loss")
    assert mean.norm() < 1e-14
    assert variance > 0.1


# --- the surrogate ------------------------------------------------------------------------------


@own_token_or_not
def test_reward_side_weights_each_token_by_the_kl_that_follows(own_token):
    token_logp = torch.randn(2, 3, requires_grad=True)
    kl_surrogate(K, token_logp, MASK, "reward", own_token=own_token).sum().backward()
    following = [[7.0, 6.0, 4.0], [24.0, 16.0, 0.0]] if own_token else [[6, 4, 0], [16, 0, 0]]
    assert token_logp.grad is not None
    assert token_logp.grad.tolist() == following


def test_gradient_flows_only_where_the_placement_says():
    for placement, to_logp, to_k in [("reward", True, False), ("loss", False, True), ("both",) * 3]:
        k, token_logp = K.clone().requires_grad_(), torch.randn(2, 3, requires_grad=True)
        kl_surrogate(k, token_logp, MASK, placement).sum().backward()
        assert (token_logp.grad is not None) == bool(to_logp)
        assert (k.grad is not None) == bool(to_k)


@own_token_or_not
@pytest.mark.parametrize("placement", KLPlacement, ids=str)
def test_both_is_reward_plus_loss_and_masked_positions_count_for_nothing(placement, own_token):
    def gradients(fill: float) -> list[Tensor]:
        k = K.masked_fill(~MASK, fill).requires_grad_()
        token_logp = (-K).masked_fill(~MASK, fill).requires_grad_()
        parts = ["reward", "loss"] if placement == "both" else [placement]
        whole = kl_surrogate(k, token_logp, MASK, placement, own_token=own_token)
        summed = sum(kl_surrogate(k, token_logp, MASK, p, own_token=own_token) for p in parts)
        torch.testing.assert_close(whole, summed)
        return list(torch.autograd.grad(whole.sum(), [k, token_logp], allow_unused=True))

    for clean, dirty in zip(gradients(0.0), gradients(torch.nan), strict=True):
        assert (clean is None) == (dirty is None)
        assert clean is None or torch.equal(clean, dirty)
    torch.testing.assert_close(gradients(0.0), gradients(torch.inf))


@own_token_or_not
def test_costs_summed_from_a_token_on_are_its_future_kl(own_token):
    for mask in (MASK, MASK.flip(1), torch.zeros(2, 3, dtype=torch.bool)):
        costs = kl_rewards(K, mask, own_token)
        assert costs[~mask].eq(0).all()
        future = future_kl(K, mask, own_token)
        to_go = future_kl(costs, mask, own_token=True)
        torch.testing.assert_close(to_go, future)


def test_kl_rewards_refuses_to_shift_over_a_hole():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with pytest.raises(ValueError, match="mask interrupts a response"):
        kl_rewards(K, mask, own_token=False)
    assert kl_rewards(K, mask, own_token=True).tolist() == [[1, 0, 4], [8, 16, 32]]


def test_weights_and_costs_are_detached():
    k = K.clone().requires_grad_()
    assert not future_kl(k, MASK, True).requires_grad
    assert not kl_rewards(k, MASK, True).requires_grad


def test_order_of_the_batch_does_not_matter():
    flipped = kl_surrogate(K.flip(0), -K.flip(0), MASK.flip(0), "both")
    assert torch.equal(flipped, kl_surrogate(K, -K, MASK, "both").flip(0))


def test_unknown_placement_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'rewards' is unknown; use 'reward', 'loss' or 'both'"):
        kl_surrogate(K, -K, MASK, "rewards")


def test_shapes_that_would_be_broadcast_are_refused():
    k, mask = torch.rand(3, 3), torch.ones(3, 3, dtype=torch.bool)
    gathered = torch.rand(3, 3, 1)
    with pytest.raises(ValueError, match=r"shapes \(3, 3\), \(3, 3, 1\) and \(3, 3\); each must"):
        kl_surrogate(k, gathered, mask, "both")


@pytest.mark.parametrize("weights", [future_kl, kl_rewards])
def test_weights_of_another_shape_or_mask_are_refused(weights):
    with pytest.raises(ValueError, match=r"k and mask have shapes \(3, 3\) and \(1, 3\); each"):
        weights(torch.zeros(3, 3), torch.ones(1, 3, dtype=torch.bool), False)
    with pytest.raises(ValueError, match=r"mask is torch.int64; pass a bool one"):
        weights(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.long), False)
