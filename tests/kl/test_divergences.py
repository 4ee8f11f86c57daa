"""Divergences against torch.distributions, high-precision truth, and their defining properties."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from rlkl.kl import (
    adaptive_kl,
    forward_kl,
    forward_reverse_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)

DIVERGENCES = [
    forward_kl,
    reverse_kl,
    forward_reverse_kl,
    jensen_shannon,
    skew_kl,
    skew_reverse_kl,
    adaptive_kl,
]
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
    for temperature in (1.0, 2.5):
        value = partial(divergence, temperature=temperature)
        if divergence is not adaptive_kl:  # its weights are constants to the gradient
            assert torch.autograd.gradcheck(value, (policy.requires_grad_(), ref))


@every_divergence
def test_no_gradient_reaches_the_reference(divergence):
    policy, ref = random_logits(2, 5).requires_grad_(), random_logits(2, 5, seed=1).requires_grad_()
    divergence(policy, ref).sum().backward()
    assert ref.grad is None
    assert policy.grad is not None
    assert policy.grad.abs().max() > 0


@every_divergence
def test_temperature_divides_both_logits_and_leaves_the_value_in_nats(divergence):
    policy, ref = random_logits(4, 6), random_logits(4, 6, seed=1)
    softened = divergence(policy, ref, temperature=2.0)
    torch.testing.assert_close(softened, divergence(policy / 2, ref / 2))
    assert (softened < divergence(policy, ref)).all()


@every_divergence
@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, math.nan])
def test_an_impossible_temperature_is_refused(divergence, temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}: must be positive"):
        divergence(random_logits(3), random_logits(3), temperature=temperature)


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


@pytest.mark.parametrize(
    "divergence", [reverse_kl, jensen_shannon, skew_kl, skew_reverse_kl], ids=lambda f: f.__name__
)
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
    truth = {
        reverse_kl: gap,
        forward_kl: gap,
        forward_reverse_kl: gap,
        jensen_shannon: math.log(2),
        skew_kl: math.log(10),
        skew_reverse_kl: math.log(10),
        adaptive_kl: gap,
    }
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


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalised_jensen_shannon_is_the_weighted_kl_from_the_mixture(weight):
    policy, ref = random_logits(5, 7, scale=2.0), random_logits(5, 7, seed=1, scale=2.0)
    mixture = Categorical(probs=weight * ref.softmax(-1) + (1 - weight) * policy.softmax(-1))
    expected = weight * kl_divergence(Categorical(logits=ref), mixture)
    expected = expected + (1 - weight) * kl_divergence(Categorical(logits=policy), mixture)
    torch.testing.assert_close(jensen_shannon(policy, ref, weight), expected)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_jensen_shannon_is_continuous_at_both_ends(end):
    policy, ref = random_logits(20, 7, scale=2.0), random_logits(20, 7, seed=1, scale=2.0)
    limit = forward_kl(policy, ref) if end == 0 else reverse_kl(policy, ref)
    assert jensen_shannon(policy, ref, end).eq(0).all()
    assert jensen_shannon(policy, ref, end, scaled=True).eq(limit).all()
    for distance in (1e-4, 1e-7):
        weight = abs(end - distance)
        assert (jensen_shannon(policy, ref, weight) < 10 * distance).all()
        scaled = jensen_shannon(policy, ref, weight, scaled=True)
        # The next term of the expansion is of the order of distance · E[(p/q)²], p/q up to 1e3.
        torch.testing.assert_close(scaled, limit, rtol=3e3 * distance, atol=0)


def test_taking_a_kl_at_the_end_of_the_unscaled_form_would_jump():
    policy, ref = random_logits(20, 7), random_logits(20, 7, seed=1)
    assert (forward_kl(policy, ref) > 100 * jensen_shannon(policy, ref, 1e-3)).all()


def test_gradient_of_scaled_jensen_shannon_runs_from_forward_to_reverse_kl():
    policy, ref = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=1)
    for weight, limit in ((1e-7, forward_kl), (1 - 1e-7, reverse_kl)):
        value = jensen_shannon(policy, ref, weight, scaled=True)
        (gradient,) = torch.autograd.grad(value.sum(), policy)
        (expected,) = torch.autograd.grad(limit(policy, ref).sum(), policy)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_skew_divergences_are_kl_from_a_mixture_with_the_first_argument(alpha):
    policy, ref = random_logits(5, 7, scale=2.0), random_logits(5, 7, seed=1, scale=2.0)
    for skew, plain, p, q in (
        (skew_kl, forward_kl, ref, policy),
        (skew_reverse_kl, reverse_kl, policy, ref),
    ):
        mixture = Categorical(probs=alpha * p.softmax(-1) + (1 - alpha) * q.softmax(-1))
        value = skew(policy, ref, alpha)
        torch.testing.assert_close(value, kl_divergence(Categorical(logits=p), mixture))
        torch.testing.assert_close(skew(policy, ref, 1e-9), plain(policy, ref))
        if alpha > 0:
            assert (value < -math.log(alpha)).all()


def test_skew_divergences_reach_their_bound_on_disjoint_supports_with_finite_gradient():
    ref = torch.tensor([-INF, 0.0])
    for skew in (skew_kl, skew_reverse_kl):
        policy = torch.tensor([0.0, -INF], requires_grad=True)
        value = skew(policy, ref, 0.1)
        value.backward()
        assert value.item() == pytest.approx(math.log(10))
        assert policy.grad is not None
        assert policy.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_forward_reverse_kl_is_the_weighted_sum(weight):
    policy, ref = random_logits(5, 7), random_logits(5, 7, seed=1)
    expected = weight * forward_kl(policy, ref) + (1 - weight) * reverse_kl(policy, ref)
    torch.testing.assert_close(forward_reverse_kl(policy, ref, weight), expected)
    half = torch.tensor([0.0, -INF]), torch.tensor([0.0, 0.0])
    assert forward_reverse_kl(*half, 0.0).isfinite()
    assert forward_reverse_kl(*half, 0.3) == INF


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (forward_reverse_kl, 1.5),
        (jensen_shannon, -0.1),
        (skew_kl, 1.0),
        (skew_reverse_kl, math.nan),
    ],
)
def test_a_share_outside_its_range_is_refused(function, value):
    with pytest.raises(ValueError, match=f"={value}: must lie in"):
        function(random_logits(3), random_logits(3, seed=1), value)


@every_divergence
def test_the_logits_normaliser_does_not_matter(divergence):
    policy, ref = random_logits(3, 6), random_logits(3, 6, seed=1)
    torch.testing.assert_close(divergence(policy + 7, ref - 3), divergence(policy, ref))


@every_divergence
def test_vocabularies_of_different_size_are_refused_by_name(divergence):
    with pytest.raises(ValueError, match="policy_logits has a vocabulary of 5 and ref_logits of 8"):
        divergence(random_logits(2, 5), random_logits(2, 8))
