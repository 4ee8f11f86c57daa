"""Off-policy estimates against enumeration: value, gradient, and what truncation does to them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlkl.kl import (
    Moments,
    TabularLM,
    effective_sample_size,
    exact_gradient,
    exact_kl,
    get_estimator,
    gradient_moments,
    prefix_channels,
    prefix_weighted_surrogate,
    prefix_weights,
    response_moments,
    response_weights,
    surrogate_moments,
    token_ratio_surrogate,
    token_ratios,
    truncated_fraction,
)

EXACT, FALSE = 1e-12, 1e-3


@pytest.fixture(params=[0, 1, 2], ids="models{}".format)
def three(request: pytest.FixtureRequest) -> tuple[TabularLM, TabularLM, TabularLM]:
    """Policy, reference and another sampler."""
    return tuple(TabularLM.random(4, 3, seed=3 * request.param + i) for i in range(3))


def token_logp(policy_logp: Tensor, tokens: Tensor) -> Tensor:
    return policy_logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def moments(surrogate, name: str, policy, ref, sampler, **options) -> tuple[Moments, Moments]:
    """Of value and gradient of a surrogate whose value is the estimate."""
    estimator = get_estimator(name)
    sampled = token_logp(sampler.policy_logp(), sampler.tokens)

    def estimate(policy_logp: Tensor) -> Tensor:
        k = estimator(policy_logp, ref.policy_logp(), policy.tokens, policy.mask)
        return surrogate(k, token_logp(policy_logp, policy.tokens), sampled, policy.mask, **options)

    value = response_moments(sampler, estimate(policy.policy_logp()))
    return value, surrogate_moments(policy, estimate, sampler)


def prefix_moments(name: str, policy, ref, sampler, **options) -> tuple[Moments, Moments]:
    own = get_estimator(name).claims.own_token
    return moments(prefix_weighted_surrogate, name, policy, ref, sampler, own_token=own, **options)


@pytest.mark.parametrize("name", ["k1", "k3", "rb"])
def test_prefix_weights_give_the_value_and_the_gradient_of_the_sequence_kl(name, three):
    policy, ref, _ = three
    value, gradient = prefix_moments(name, *three)
    assert relative_error(value.mean, exact_kl(policy, ref)) < EXACT
    assert relative_error(gradient.mean, exact_gradient(policy, ref)) < EXACT


def without_token(lm: TabularLM) -> TabularLM:
    """The model that never says 2, so that many of its responses are impossible."""
    return lm.with_logits(lm.logits.index_fill(1, torch.tensor(2), -torch.inf))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["k1", "k3", "rb"])
def test_what_the_policy_cannot_say_counts_nothing(name, shared, three):
    """Weights there are 0 and log-ratios infinite; or neither is a number, if no model says it."""
    policy, ref, sampler = without_token(three[0]), *three[1:]
    if shared:
        ref, sampler = without_token(ref), without_token(sampler)
    value, gradient = prefix_moments(name, policy, ref, sampler)
    assert bool(gradient.mean.isfinite().all())
    if name == "k3" and not shared:
        return  # it misses the reference's mass there, on its own policy's responses too
    assert relative_error(value.mean, exact_kl(policy, ref)) < EXACT
    assert relative_error(gradient.mean, exact_gradient(policy, ref)) < EXACT


def test_topk_counts_no_tail_where_the_policy_cannot_have_sampled(three):
    policy, ref, sampler = without_token(three[0]), *three[1:]
    topk = replace(get_estimator("topk"), k=1)
    logp = policy.policy_logp().requires_grad_()
    k = topk(logp, ref.policy_logp(), policy.tokens, policy.mask)
    sampled = token_logp(sampler.policy_logp(), policy.tokens)
    per_response = prefix_weighted_surrogate(
        k, token_logp(logp, policy.tokens), sampled, policy.mask, own_token=True
    )
    mean = response_moments(sampler, per_response).mean
    assert relative_error(mean, exact_kl(policy, ref)) < EXACT
    (gradient,) = torch.autograd.grad(per_response.sum(), logp)
    assert bool(gradient.isfinite().all())


def test_terms_of_weight_0_are_0_whatever_k_is_there():
    logp = torch.tensor([[-torch.inf, -1.0, -1.0]])
    k = torch.tensor([[torch.nan, torch.inf, 1.0]])
    arguments = k, logp, torch.full((1, 3), -1.0), torch.ones(1, 3, dtype=torch.bool)
    assert prefix_weighted_surrogate(*arguments, own_token=True).tolist() == [0]
    assert prefix_channels(*arguments, own_token=True).future.tolist() == [[0, 0, 0]]
    assert token_ratio_surrogate(*arguments).tolist() == [torch.inf]  # of the second token


@pytest.mark.parametrize("name", ["k1", "k3", "rb"])
def test_without_weights_an_older_policys_responses_mislead(name, three):
    policy, ref, sampler = three
    k = get_estimator(name)(policy.policy_logp(), ref.policy_logp(), policy.tokens, policy.mask)
    mean = response_moments(sampler, k.sum(1)).mean
    assert relative_error(mean, exact_kl(policy, ref)) > FALSE


def test_rb_with_prefix_weights_varies_less_than_k1_with_theirs_or_with_the_responses(three):
    policy, ref, sampler = three
    rb, k1 = (prefix_moments(name, *three)[0].variance for name in ("rb", "k1"))
    weights = response_weights(
        *(token_logp(lm.policy_logp(), policy.tokens) for lm in (policy, sampler)), policy.mask
    )
    whole = response_moments(sampler, weights * (policy.response_logp() - ref.response_logp()))
    assert relative_error(whole.mean, exact_kl(policy, ref)) < EXACT
    assert rb < k1 < whole.variance


def test_token_ratios_give_the_token_level_gradient_at_the_samplers_prefixes(three):
    policy, ref, sampler = three
    logits = policy.logits.clone().requires_grad_()
    p, q = policy.with_logits(logits).policy_logp(), ref.policy_logp()
    token_kl = (p.exp() * (p - q)).sum(-1)
    visited = sampler.response_logp().exp().unsqueeze(1)
    expected = (visited * token_kl)[policy.mask].sum()
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for name in ("k1", "k3"):
        value, gradient = moments(token_ratio_surrogate, name, *three)
        assert relative_error(value.mean, expected.detach()) < EXACT
        assert relative_error(gradient.mean, expected_gradient) < EXACT
        assert relative_error(gradient.mean, exact_gradient(policy, ref)) > FALSE


@pytest.mark.parametrize("name", ["k1", "k3", "rb"])
def test_where_the_policies_agree_the_gradient_is_the_on_policy_one_sample_by_sample(name, three):
    policy, ref, _ = three
    _, gradient = prefix_moments(name, policy, ref, policy)
    on_policy = gradient_moments(policy, ref, get_estimator(name), "both")
    torch.testing.assert_close(gradient, on_policy)


@pytest.mark.parametrize("name", ["k1", "rb"])
@pytest.mark.parametrize("bound", [None, 1.5])
def test_channels_are_the_two_parts_of_the_surrogates_gradient(name, bound, three):
    policy, ref, sampler = three
    estimator = get_estimator(name)
    own = estimator.claims.own_token
    logp = policy.policy_logp().requires_grad_()
    sampled = token_logp(sampler.policy_logp(), policy.tokens)
    k = estimator(logp, ref.policy_logp(), policy.tokens, policy.mask)
    arguments = (k, token_logp(logp, policy.tokens), sampled, policy.mask)
    whole = prefix_weighted_surrogate(*arguments, own_token=own, truncate_at=bound).sum()
    pathwise, future = prefix_channels(*arguments, own_token=own, truncate_at=bound)
    parts = (pathwise * k + future * torch.where(policy.mask, arguments[1], 0.0)).sum()
    expected, ours = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (whole, parts))
    torch.testing.assert_close(ours, expected)


def test_truncation_lowers_the_value_and_bends_the_gradient_and_says_how_often(three):
    policy, ref, sampler = three
    exact = exact_kl(policy, ref)
    means = [prefix_moments("rb", *three, truncate_at=c)[0].mean for c in (1.0, 2.0, 5.0, 1e9)]
    assert means == sorted(means)
    assert exact - means[0] > FALSE
    torch.testing.assert_close(means[-1], exact)
    value, gradient = prefix_moments("rb", *three, truncate_at=1.0)
    whole, whole_gradient = prefix_moments("rb", *three)
    assert value.variance < whole.variance
    assert gradient.variance < whole_gradient.variance
    assert relative_error(gradient.mean, exact_gradient(policy, ref)) > FALSE

    logps = [token_logp(lm.policy_logp(), policy.tokens) for lm in (policy, sampler)]
    weights = prefix_weights(*logps, policy.mask)
    share = truncated_fraction(weights, policy.mask, 2.0)
    assert share.item() == pytest.approx((weights[policy.mask] > 2).double().mean().item())
    assert truncated_fraction(weights, policy.mask, 1e9) == 0


def test_weights_are_products_over_the_prefix_and_ignore_padding(three):
    policy, _, sampler = three
    logps = [token_logp(lm.policy_logp(), policy.tokens) for lm in (policy, sampler)]
    padded = [x.masked_fill(~policy.mask, torch.nan) for x in logps]
    weights, ratios = (f(*padded, policy.mask) for f in (prefix_weights, token_ratios))
    whole = response_weights(*padded, policy.mask)
    for n in range(len(policy.tokens)):
        product = 1.0
        for t in range(int(policy.mask[n].sum())):
            assert weights[n, t].item() == pytest.approx(product)
            product *= (logps[0][n, t] - logps[1][n, t]).exp().item()
        assert whole[n].item() == pytest.approx(product)
    assert (ratios[~policy.mask] == 1).all()
    assert prefix_weights(logps[0], logps[0], policy.mask).eq(1).all()


def test_the_sampler_gets_no_gradient():
    policy, sampler = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    mask = torch.ones(2, 3, dtype=torch.bool)
    prefix_weights(policy, sampler, mask).sum().backward()
    assert policy.grad is not None
    assert sampler.grad is None


def test_effective_sample_size_counts_equal_weights_and_survives_huge_ones():
    assert effective_sample_size(torch.full((7,), 3.0)) == 7
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == 1
    huge = torch.tensor([1e200, 1e200, 0.0])
    assert effective_sample_size(huge) == 2


def test_a_bound_that_would_cut_on_policy_weights_is_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"truncate_at is 0\.5; it must be at least 1"):
        prefix_weights(x, x, torch.ones(1, 1, dtype=torch.bool), truncate_at=0.5)


def test_shapes_that_would_be_broadcast_are_refused():
    logp, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"sampler_token_logp and mask have shapes .* \(2, 1\)"):
        prefix_weights(logp, logp[:, :1], mask)
    with pytest.raises(ValueError, match=r"k and mask have shapes \(1, 3\) and \(2, 3\)"):
        token_ratio_surrogate(logp[:1], logp, logp, mask)
