"""Advantages against their defining sums, whitening by its property, on unequal responses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlkl.kl import TabularLM, exact_gradient, future_kl, get_estimator
from rlkl.rl import gae, leave_one_out_mean, whiten

LENGTHS = (1, 3, 5, 5)


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def defining_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list:
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} − V_{t+l}) over one response, V = 0 past its end."""
    after = [*values[1:], 0.0]
    errors = [r + gamma * w - v for r, v, w in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** step * error for step, error in enumerate(errors[t:]))
        for t in range(len(errors))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.97, 1.0), (1.0, 0.0)])
def test_gae_is_the_discounted_sum_of_one_step_errors(mask, gamma, lam):
    rewards, values = random(0, 4, 5), random(1, 4, 5)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(LENGTHS):
        expected = defining_sum(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam
        )
        torch.testing.assert_close(advantages[row, :length], torch.tensor(expected))
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])


def test_lambda_one_gives_reward_to_go_minus_value(mask):
    rewards, values = random(0, 4, 5) * mask, random(1, 4, 5)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = torch.stack([rewards[:, t:].sum(1) for t in range(5)], 1)
    torch.testing.assert_close(returns[mask], to_go[mask])
    torch.testing.assert_close(advantages[mask], (to_go - values)[mask])


def test_lambda_zero_gives_the_one_step_error(mask):
    rewards, values = random(0, 4, 5), random(1, 4, 5)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    assert advantages[2, 0] == pytest.approx(
        float(rewards[2, 0] + 0.9 * values[2, 1] - values[2, 0])
    )
    assert advantages[0, 0] == pytest.approx(float(rewards[0, 0] - values[0, 0]))


def test_padding_of_rewards_and_values_changes_nothing_and_comes_back_zero(mask):
    rewards, values = random(0, 4, 5), random(1, 4, 5)
    clean = gae(rewards, values, mask)
    dirty = gae(rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf), mask)
    for ours, theirs in zip(clean, dirty, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours[~mask].any()


def test_advantages_and_returns_carry_no_gradient(mask):
    values = random(1, 4, 5).requires_grad_()
    advantages, returns = gae(random(0, 4, 5), values, mask)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_whitened_real_tokens_have_mean_zero_and_variance_one(mask):
    whitened, _ = whiten(5 + 3 * random(0, 4, 5), mask)
    assert float(whitened[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(whitened[mask].square().mean()) == pytest.approx(1, abs=1e-12)
    assert not whitened[~mask].any()


def test_whitening_divides_by_the_scale_it_returns(mask):
    x = 5 + 3 * random(0, 4, 5)
    whitened, scale = whiten(x, mask)
    torch.testing.assert_close((whitened * scale)[mask], (x - x[mask].mean())[mask])


def test_whitening_without_shift_keeps_the_mean_and_has_variance_one(mask):
    x = 5 + 3 * random(0, 4, 5)
    whitened, _ = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(whitened[mask].mean(), x[mask].mean())
    assert float(whitened[mask].var(correction=0)) == pytest.approx(1)


def test_whitening_does_not_read_padding(mask):
    x = random(0, 4, 5)
    clean, scale = whiten(x, mask)
    dirty, dirty_scale = whiten(x.masked_fill(~mask, 1e9), mask)
    assert torch.equal(clean, dirty)
    assert scale == dirty_scale
    nan, _ = whiten(x.masked_fill(~mask, torch.nan), mask)
    assert torch.equal(clean, nan)


@given(value=st.floats(-100, 100), count=st.integers(2, 40))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_has_no_scale_and_becomes_zero(dtype, value, count):
    """Whatever the rounding of its mean: noise must not be blown up to variance 1."""
    x = torch.full((1, count), value, dtype=dtype)
    whitened, scale = whiten(x, torch.ones(1, count, dtype=torch.bool))
    assert scale == 1
    assert whitened.abs().max() <= 1e-5 * max(1.0, abs(value))


def test_a_small_but_real_spread_is_whitened():
    x = torch.tensor([[1.0, 1.0001, 0.9999, 1.0]], dtype=torch.float32)
    whitened, scale = whiten(x, torch.ones(1, 4, dtype=torch.bool))
    assert float(whitened.square().mean()) == pytest.approx(1, abs=1e-3)
    assert float(scale) == pytest.approx(1e-4 / 2**0.5, rel=1e-2)


# --- a baseline for the future KL, enumerated over all batches of two or three responses ----------


def no_baseline(x: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(x)


def batch_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over all responses that reach the position, the own one included."""
    return torch.where(mask, x.sum(0) / mask.sum(0).clamp(min=1), 0.0)


def batch_moments(policy: TabularLM, ref: TabularLM, baseline, size: int) -> tuple[Tensor, float]:
    """Mean and variance (trace) of the mean gradient of `size` responses, pathwise and future."""
    tokens, mask = policy.tokens, policy.mask
    rb = get_estimator("rb")

    def of_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
        logp = policy.with_logits(logits).policy_logp()
        own = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return own, rb(logp, ref.policy_logp(), tokens, mask)

    score, pathwise = torch.autograd.functional.jacobian(of_tokens, policy.logits.detach())
    score, pathwise = score.flatten(2), pathwise.flatten(2).sum(1)  # [N, T, P], [N, P]
    future = future_kl(rb(policy.policy_logp(), ref.policy_logp(), tokens, mask), mask, False)
    batches = torch.cartesian_prod(*[torch.arange(len(tokens))] * size)  # [batches, size]
    prob = policy.response_logp().exp()[batches].prod(1)
    weight = torch.where(mask, future, 0.0)[batches]
    weight = weight - torch.vmap(baseline)(weight, mask[batches])
    # Σ_i Σ_t g_it w_it, without a [batches, size, T, P] tensor.
    gradient = sum(
        torch.einsum("nt,ntp->np", weight[:, i], score[batches[:, i]]) + pathwise[batches[:, i]]
        for i in range(size)
    )
    gradient = gradient / size
    mean = prob @ gradient
    return mean, float(prob @ (gradient - mean).square().sum(1))


def models(seed: int, eos: int | None) -> tuple[TabularLM, TabularLM]:
    return (
        TabularLM.random(3, 3, eos=eos, seed=2 * seed),
        TabularLM.random(3, 3, eos=eos, seed=2 * seed + 1),
    )


@pytest.mark.parametrize("eos", [0, None])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_leave_one_out_mean_is_a_baseline_that_biases_nothing(seed, eos):
    policy, ref = models(seed, eos)
    exact = exact_gradient(policy, ref).flatten()
    for baseline in (no_baseline, leave_one_out_mean):
        mean, _ = batch_moments(policy, ref, baseline, size=2)
        assert (mean - exact).norm() < 1e-12 * exact.norm()
    biased, _ = batch_moments(policy, ref, batch_mean, size=2)
    assert (biased - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_among_three_responses_of_one_length_the_baseline_calms_the_gradient(seed):
    variance = [
        batch_moments(*models(seed, None), b, 3)[1] for b in (no_baseline, leave_one_out_mean)
    ]
    assert variance[1] < 0.95 * variance[0]


def test_it_can_add_noise_where_most_responses_end_at_once():
    """Their future is 0, and they take the others' mean for it."""
    pair = models(1, 0)
    plain, noisy = (batch_moments(*pair, b, 3)[1] for b in (no_baseline, leave_one_out_mean))
    assert noisy > 1.2 * plain


def test_the_leave_one_out_mean_is_the_obvious_loop_and_ignores_what_is_masked(mask):
    x = random(2, 4, 5).masked_fill(~mask, torch.nan)
    found = leave_one_out_mean(x, mask)
    for i, t in mask.nonzero().tolist():
        others = [float(x[j, t]) for j in range(4) if j != i and mask[j, t]]
        assert float(found[i, t]) == pytest.approx(sum(others) / len(others) if others else 0.0)
    assert (found[~mask] == 0).all()
    assert (leave_one_out_mean(random(0, 1, 5), mask[:1]) == 0).all()


def test_masked_positions_between_real_tokens_are_stepped_over():
    """A tool's text between two turns, or padding on the left, changes no advantage."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 3, generator=generator)
    whole = gae(rewards, values, torch.ones(4, 3, dtype=torch.bool), gamma=0.9, lam=0.8)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1]], dtype=torch.bool).expand(4, 6)
    spread = [torch.full((4, 6), 9.0).masked_scatter(mask, x) for x in (rewards, values)]
    for expected, found in zip(whole, gae(*spread, mask, gamma=0.9, lam=0.8), strict=True):
        torch.testing.assert_close(found[mask].view(4, 3), expected)
        assert not found[~mask].any()


def test_whitening_nothing_is_refused():
    with pytest.raises(ValueError, match="mask has no True"):
        whiten(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
