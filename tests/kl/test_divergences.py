"""Divergences against torch.distributions, high-precision truth, and their defining properties."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from rlkl.kl import forward_kl, jensen_shannon, reverse_kl

DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda f: f.__name__)

INF = torch.inf


def random_logits(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearby_logits(kl: float, vocab_size: int = 1000) -> tuple[Tensor, Tensor]:
    """Float32 logits of 64 pairs of distributions, about `kl` nats apart."""
    policy = random_logits(64, vocab_size, scale=3.0)
    ref = policy + math.sqrt(2 * kl) * random_logits(64, vocab_size, seed=1)
    return policy.float(), ref.float()


def test_reverse_kl_is_of_the_policy_from_the_reference():
    policy, ref = random_logits(5, 4, 7), random_logits(5, 4, 7, seed=1)
    expected = kl_divergence(Categorical(logits=policy), Categorical(logits=ref))
    torch.testing.assert_close(reverse_kl(policy, ref), expected)
    assert (reverse_kl(policy, ref) - forward_kl(policy, ref)).abs().min() > 1e-4


def test_forward_kl_is_of_the_reference_from_the_policy():
    policy, ref = random_logits(5, 4, 7), random_logits(5, 4, 7, seed=1)
    expected = kl_divergence(Categorical(logits=ref), Categorical(logits=policy))
    torch.testing.assert_close(forward_kl(policy, ref), expected)


def test_jensen_shannon_is_the_mean_kl_from_the_mixture():
    policy, ref = random_logits(5, 4, 7), random_logits(5, 4, 7, seed=1)
    mixture = Categorical(probs=(policy.softmax(-1) + ref.softmax(-1)) / 2)
    parts = [kl_divergence(Categorical(logits=x), mixture) for x in (policy, ref)]
    torch.testing.assert_close(jensen_shannon(policy, ref), sum(parts) / 2)
    torch.testing.assert_close(jensen_shannon(policy, ref), jensen_shannon(ref, policy))


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_identical_logits_give_exactly_zero_in_value_and_gradient(divergence, dtype):
    logits = random_logits(3, 50, scale=5.0).to(dtype)
    policy = logits.clone().requires_grad_()
    value = divergence(policy, logits)
    value.sum().backward()
    assert value.eq(0).all()
    assert policy.grad is not None
    assert policy.grad.eq(0).all()


@every_divergence
@pytest.mark.parametrize("kl", [1e-6, 1e-3, 1.0])
def test_float32_keeps_three_digits_from_a_millionth_of_a_nat_up(divergence, kl):
    policy, ref = nearby_logits(kl)
    value, truth = divergence(policy, ref), divergence(policy.double(), ref.double())
    assert value.dtype == torch.float32
    assert (value > 0).all()
    torch.testing.assert_close(value.double(), truth, rtol=1e-3, atol=0)


def test_a_tiny_kl_is_all_rounding_in_the_direct_formula():
    policy, ref = nearby_logits(1e-6)
    logp, logq = policy.log_softmax(-1), ref.log_softmax(-1)
    direct = (logp.exp() * (logp - logq)).sum(-1).double()
    truth = reverse_kl(policy.double(), ref.double())
    assert ((direct - truth).abs() / truth).max() > 1e-2


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_reduced_in_float32(divergence, dtype):
    policy, ref = (x.to(dtype) for x in nearby_logits(1.0))
    value = divergence(policy, ref)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence(policy.float(), ref.float()), rtol=0, atol=0)


@every_divergence
def test_gradient_is_that_of_finite_differences(divergence):
    policy, ref = random_logits(2, 5, scale=4.0), random_logits(2, 5, seed=1, scale=4.0)
    assert torch.autograd.gradcheck(divergence, (policy.requires_grad_(), ref.requires_grad_()))


@every_divergence
def test_a_token_that_both_exclude_does_not_matter(divergence):
    policy, ref = random_logits(3, 6).requires_grad_(), random_logits(3, 6, seed=1)
    excluded = torch.full((3, 2), -INF)
    padded = divergence(torch.cat([policy, excluded], -1), torch.cat([ref, excluded], -1))
    torch.testing.assert_close(padded, divergence(policy, ref))
    expected = torch.autograd.grad(divergence(policy, ref).sum(), policy)
    torch.testing.assert_close(torch.autograd.grad(padded.sum(), policy), expected)


def test_mass_on_an_excluded_token_is_infinitely_far_except_for_jensen_shannon():
    everything, half = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -INF])
    assert reverse_kl(everything, half) == INF
    assert forward_kl(half, everything) == INF
    torch.testing.assert_close(reverse_kl(half, everything).item(), math.log(2))
    torch.testing.assert_close(forward_kl(everything, half).item(), math.log(2))
    expected = 0.5 * math.log(4 / 3) + 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    torch.testing.assert_close(jensen_shannon(everything, half).item(), expected)
    torch.testing.assert_close(jensen_shannon(half, everything).item(), expected)


@pytest.mark.parametrize("divergence", [reverse_kl, jensen_shannon])
def test_gradient_is_finite_where_the_policy_excludes_a_token(divergence):
    policy = torch.tensor([1.0, 0.0, -INF], requires_grad=True)
    divergence(policy, torch.tensor([0.0, 0.0, 0.0])).backward()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
    assert policy.grad[2] == 0


@pytest.mark.parametrize("gap", [50.0, 200.0, 1e4, 1e30])
def test_far_apart_distributions_neither_overflow_nor_turn_nan(gap):
    policy = torch.tensor([0.0, gap], dtype=torch.float32, requires_grad=True)
    ref = torch.tensor([gap, 0.0], dtype=torch.float32)
    truth = {reverse_kl: gap, forward_kl: gap, jensen_shannon: math.log(2)}
    for divergence, expected in truth.items():
        value = divergence(policy, ref)
        (grad,) = torch.autograd.grad(value, policy)
        assert value.item() == pytest.approx(expected)
        assert grad.isfinite().all()


def test_jensen_shannon_is_continuous_as_a_token_disappears():
    ref = torch.tensor([0.0, 0.0])
    limit = jensen_shannon(torch.tensor([0.0, -INF]), ref)
    for logit in (-20.0, -40.0, -800.0):
        value = jensen_shannon(torch.tensor([0.0, logit]), ref)
        torch.testing.assert_close(value, limit, rtol=0, atol=30 * math.exp(logit) + 1e-15)


@every_divergence
def test_the_logits_normaliser_does_not_matter(divergence):
    policy, ref = random_logits(3, 6), random_logits(3, 6, seed=1)
    torch.testing.assert_close(divergence(policy + 7, ref - 3), divergence(policy, ref))


@every_divergence
def test_vocabularies_of_different_size_are_refused_by_name(divergence):
    with pytest.raises(ValueError, match="policy_logits has a vocabulary of 5 and ref_logits of 8"):
        divergence(random_logits(2, 5), random_logits(2, 8))
