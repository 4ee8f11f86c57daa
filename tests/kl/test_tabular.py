"""The enumeration itself, against probability theory, finite differences and sampling."""

from itertools import product

import pytest
import torch

from rlkl.kl import (
    TabularLM,
    exact_gradient,
    exact_kl,
    get_estimator,
    gradient_moments,
    surrogate_moments,
    value_moments,
)


@pytest.mark.parametrize("eos", [0, 2, None])
def test_probabilities_of_all_responses_sum_to_one(eos):
    lm = TabularLM.random(3, 4, eos=eos, scale=2.0)
    torch.testing.assert_close(lm.response_logp().exp().sum().item(), 1.0)


def test_responses_end_with_eos_or_are_cut():
    lm = TabularLM.random(4, 3, eos=1)
    seen = set()
    for tokens, mask in zip(lm.tokens.tolist(), lm.mask.tolist(), strict=True):
        response = [y for y, real in zip(tokens, mask, strict=True) if real]
        assert mask == sorted(mask, reverse=True)  # padded on the right
        assert 1 not in response[:-1]
        assert response[-1] == 1 or len(response) == 3
        seen.add(tuple(response))
    assert len(seen) == len(lm.tokens) == 1 + 3 + 9 + 27
    assert len(lm.prefixes) == len(lm.logits) == 1 + 3 + 9


def test_each_position_has_the_logits_of_its_own_prefix():
    lm = TabularLM.random(3, 3)
    policy_logp = lm.policy_logp()
    for n, (tokens, mask) in enumerate(zip(lm.tokens.tolist(), lm.mask.tolist(), strict=True)):
        for t in range(sum(mask)):
            row = lm.prefixes.index(tuple(tokens[:t]))
            assert torch.equal(policy_logp[n, t], lm.logits[row].log_softmax(-1))


def test_a_seed_gives_one_model():
    assert torch.equal(TabularLM.random(3, 3, seed=5).logits, TabularLM.random(3, 3, seed=5).logits)
    assert not torch.equal(TabularLM.random(3, 3).logits, TabularLM.random(3, 3, seed=5).logits)


def test_kl_of_one_step_is_that_of_the_distributions():
    policy, ref = TabularLM.random(5, 1, seed=0), TabularLM.random(5, 1, seed=1)
    p, q = (torch.distributions.Categorical(logits=lm.logits[0]) for lm in (policy, ref))
    torch.testing.assert_close(exact_kl(policy, ref), torch.distributions.kl_divergence(p, q))


def test_exact_gradient_is_that_of_finite_differences(pair):
    policy, ref = pair
    gradient, step = exact_gradient(policy, ref), 1e-5
    for i in range(0, policy.logits.numel(), 5):
        shift = torch.zeros_like(policy.logits)
        shift.view(-1)[i] = step
        moved = (policy.with_logits(policy.logits + s) for s in (shift, -shift))
        above, below = (exact_kl(lm, ref) for lm in moved)
        difference = (above - below) / (2 * step)
        torch.testing.assert_close(gradient.view(-1)[i], difference, rtol=1e-5, atol=1e-9)


def test_moments_are_those_of_independent_samples(pair):
    """One Monte-Carlo check of the whole chain, with 5 standard errors of room."""
    policy, ref = pair
    mean, variance = value_moments(policy, ref, get_estimator("rb"))
    prob = policy.response_logp().exp()
    n = 20_000
    draws = torch.multinomial(prob, n, True, generator=torch.Generator().manual_seed(0))
    batch = (policy.policy_logp(), ref.policy_logp(), policy.tokens, policy.mask)
    k = get_estimator("rb")(*(x[draws] for x in batch)).sum(1)
    assert abs(k.mean() - mean) < 5 * (variance / n) ** 0.5
    spread_of_squares = (k - mean).square().std() / n**0.5
    assert abs(k.var() - variance) < 5 * spread_of_squares


def test_gradient_variance_is_the_trace_of_the_covariance(pair):
    policy, ref = pair
    mean, variance = gradient_moments(policy, ref, get_estimator("rb"), "both")
    second_moment = torch.zeros(())
    for n, prob in enumerate(policy.response_logp().exp()):
        alone = surrogate_moments(policy, lambda logp, n=n: _rb_surrogate(logp, policy, ref, n))
        second_moment = second_moment + prob * alone.mean.square().sum()
    torch.testing.assert_close(variance, second_moment - mean.square().sum())


def _rb_surrogate(policy_logp, policy, ref, n):
    """The surrogate of response n by its definition, the same for all, so that the mean is it."""
    length = int(policy.mask[n].sum())
    logp, ref_logp = policy_logp[n, :length], ref.policy_logp()[n, :length]
    d = (logp.exp() * (logp - ref_logp)).sum(-1)
    total = d.sum()
    for t in range(length):
        total = total + logp[t, policy.tokens[n, t]] * d[t + 1 :].sum().detach()
    return total.expand(len(policy_logp))


def test_impossible_responses_have_no_say():
    """A model that never leaves two tokens is the model over those two tokens."""
    logits = {lm: torch.randn(1, 3, generator=torch.Generator().manual_seed(lm)) for lm in (0, 1)}
    small = [TabularLM(x[:, :2], 1) for x in logits.values()]
    policy = TabularLM(logits[0].index_fill(1, torch.tensor(2), -torch.inf), 1)
    ref = TabularLM(logits[1].index_fill(1, torch.tensor(2), -torch.inf), 1)
    torch.testing.assert_close(exact_kl(policy, ref), exact_kl(*small))
    torch.testing.assert_close(exact_gradient(policy, ref)[:, :2], exact_gradient(*small))
    for name, placement in product(("rb", "k1", "k3", "topk"), ("reward", "loss", "both")):
        large, expected = (
            gradient_moments(*models, get_estimator(name), placement)
            for models in ((policy, ref), small)
        )
        torch.testing.assert_close(large.mean[:, :2], expected.mean)
        torch.testing.assert_close(large.variance, expected.variance)


@pytest.mark.parametrize("name", ["rb", "k1", "k3"])
def test_an_infinite_kl_behind_a_token_that_is_never_said_has_no_say(name):
    """After token 1, which the policy never says, it would say what the reference never does."""
    policy, ref = TabularLM.random(3, 2, eos=None, seed=0), TabularLM.random(3, 2, eos=None, seed=1)
    after = policy.prefixes.index((1,))
    policy.logits[0, 1] = ref.logits[0, 1] = ref.logits[after, 2] = -torch.inf
    gradient = gradient_moments(policy, ref, get_estimator(name), "both").mean
    torch.testing.assert_close(gradient, exact_gradient(policy, ref))


def test_models_of_different_responses_are_refused():
    with pytest.raises(ValueError, match="models of the same responses"):
        exact_kl(TabularLM.random(3, 2), TabularLM.random(3, 3))
    with pytest.raises(ValueError, match="models of the same responses"):
        exact_gradient(TabularLM.random(3, 2, eos=0), TabularLM.random(3, 2, eos=1))


def test_wrong_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"logits has 2 rows; .* make 3 prefixes"):
        TabularLM(torch.zeros(2, 3), length=2)
    with pytest.raises(ValueError, match=r"eos is 3; use a token of 0\.\.2"):
        TabularLM.random(3, 2, eos=3)
    with pytest.raises(ValueError, match="length is 0"):
        TabularLM.random(3, 0)
