"""Every claim of every estimator, the true and the false, against exact enumeration."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlkl.kl import (
    ESTIMATORS,
    Estimator,
    KLPlacement,
    SampledEstimator,
    check_placement,
    exact_gradient,
    exact_kl,
    get_estimator,
    gradient_moments,
    value_moments,
)
from rlkl.kl.tabular import TabularLM

EXACT, FALSE = 1e-12, 1e-3
"""Relative errors: below the first a claim holds, above the second it is seen to be false."""

VOCAB_SIZE, TOP_K = 4, 2
HEADS = {name: replace(get_estimator(name), k=TOP_K) for name in ("topk", "topk_bucket")}
"""With a head of half of the vocabulary, so that there is a tail."""

CASES = ESTIMATORS | HEADS
every_estimator = pytest.mark.parametrize("estimator", CASES.values(), ids=CASES.keys())
every_placement = pytest.mark.parametrize("placement", KLPlacement, ids=str)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def on_every_response(estimator: Estimator, policy: TabularLM, ref: TabularLM) -> Tensor:
    return estimator(policy.policy_logp(), ref.policy_logp(), policy.tokens, policy.mask)


# --- claims -------------------------------------------------------------------------------------


@every_estimator
def test_unbiased_claim(estimator, pair):
    error = relative_error(value_moments(*pair, estimator).mean, exact_kl(*pair))
    assert error < EXACT if estimator.claims.unbiased else error > FALSE


@every_estimator
def test_non_negative_claim(estimator, pair):
    lowest = on_every_response(estimator, *pair).min().item()
    assert lowest >= 0 if estimator.claims.non_negative else lowest < -FALSE


@every_estimator
@every_placement
def test_exact_gradient_claim(estimator, placement, pair):
    error = relative_error(
        gradient_moments(*pair, estimator, placement).mean, exact_gradient(*pair)
    )
    assert error < EXACT if placement in estimator.claims.exact_gradient else error > FALSE


@every_estimator
def test_own_token_claim(estimator, pair):
    """E[∇k_t | h_t] is ∇E[k_t | h_t], by finite differences, just where the claim is False."""
    policy, ref = (TabularLM(lm.logits[:1], length=1) for lm in pair)
    differentiated = gradient_moments(policy, ref, estimator, "loss").mean
    step, differences = 1e-6, torch.zeros_like(policy.logits)
    for v in range(VOCAB_SIZE):
        shift = step * torch.nn.functional.one_hot(torch.tensor([v]), VOCAB_SIZE)
        above, below = (
            value_moments(policy.with_logits(policy.logits + s), ref, estimator).mean
            for s in (shift, -shift)
        )
        differences[0, v] = (above - below) / (2 * step)
    error = relative_error(differentiated, differences)
    assert error > FALSE if estimator.claims.own_token else error < 1e-8


@every_estimator
def test_needs_claim(estimator, pair):
    policy, k = pair.policy, on_every_response(estimator, *pair)
    sampled = torch.nn.functional.one_hot(policy.tokens, VOCAB_SIZE).bool()
    only_sampled = [torch.where(sampled, lm.policy_logp(), torch.nan) for lm in pair]
    blinded = estimator(*only_sampled, policy.tokens, policy.mask)
    if estimator.claims.needs == "token_logp":
        assert torch.equal(blinded, k)
    else:
        assert blinded[policy.mask].isnan().all()


# --- what a refused pair would have optimised -----------------------------------------------------


def reverse_token_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def forward_token_kl(p: Tensor, q: Tensor) -> Tensor:
    return (q * (q.log() - p.log())).sum(-1)


def token_level_gradient(
    policy: TabularLM, ref: TabularLM, divergence: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Σ_t E[∇ divergence(π(·|h_t), q(·|h_t))], the distribution of the prefixes h_t held fixed."""
    logits = policy.logits.clone().requires_grad_()
    per_token = divergence(policy.with_logits(logits).policy_logp().exp(), ref.policy_logp().exp())
    prob = policy.response_logp().exp().unsqueeze(1)
    return torch.autograd.grad((prob * per_token)[policy.mask].sum(), logits)[0]


def gradient_of_expected_k2(policy: TabularLM, ref: TabularLM) -> Tensor:
    """∇E[Σ u²/2], through the distribution of the responses and through u."""
    logits = policy.logits.clone().requires_grad_()
    moving = policy.with_logits(logits)
    sums = on_every_response(get_estimator("k2"), moving, ref).sum(1)
    return torch.autograd.grad((moving.response_logp().exp() * sums).sum(), logits)[0]


def bucketed_kl(p: Tensor, q: Tensor) -> Tensor:
    """D_KL of the head's tokens and one category for the rest, by sorting."""
    order = p.detach().sort(descending=True).indices
    p, q = (
        torch.cat([x[..., :TOP_K], x[..., TOP_K:].sum(-1, keepdim=True)], -1)
        for x in (p.gather(-1, order), q.gather(-1, order))
    )
    return reverse_token_kl(p, q)


def gradient_of_expected_bucket(policy: TabularLM, ref: TabularLM) -> Tensor:
    """∇E[Σ bucketed KL], through the distribution of the responses and through the KL."""
    logits = policy.logits.clone().requires_grad_()
    moving = policy.with_logits(logits)
    k = bucketed_kl(moving.policy_logp().exp(), ref.policy_logp().exp())
    sums = torch.where(policy.mask, k, 0.0).sum(1)
    return torch.autograd.grad((moving.response_logp().exp() * sums).sum(), logits)[0]


FOLLOWED_INSTEAD: dict[tuple[str, str], Callable[[TabularLM, TabularLM], Tensor]] = {
    ("k1", "loss"): lambda policy, ref: torch.zeros_like(policy.logits),
    ("k2", "reward"): lambda policy, ref: (
        gradient_of_expected_k2(policy, ref) - token_level_gradient(policy, ref, reverse_token_kl)
    ),
    ("k2", "loss"): lambda policy, ref: token_level_gradient(policy, ref, reverse_token_kl),
    ("k2", "both"): gradient_of_expected_k2,
    ("k3", "reward"): lambda policy, ref: (
        exact_gradient(policy, ref) - token_level_gradient(policy, ref, forward_token_kl)
    ),
    ("k3", "loss"): lambda policy, ref: token_level_gradient(policy, ref, forward_token_kl),
    ("rb", "reward"): lambda policy, ref: (
        exact_gradient(policy, ref) - token_level_gradient(policy, ref, reverse_token_kl)
    ),
    ("rb", "loss"): lambda policy, ref: token_level_gradient(policy, ref, reverse_token_kl),
    ("topk", "reward"): lambda policy, ref: (
        exact_gradient(policy, ref) - token_level_gradient(policy, ref, reverse_token_kl)
    ),
    ("topk", "loss"): lambda policy, ref: token_level_gradient(policy, ref, reverse_token_kl),
    ("topk_bucket", "reward"): lambda policy, ref: (
        gradient_of_expected_bucket(policy, ref) - token_level_gradient(policy, ref, bucketed_kl)
    ),
    ("topk_bucket", "loss"): lambda policy, ref: token_level_gradient(policy, ref, bucketed_kl),
    ("topk_bucket", "both"): gradient_of_expected_bucket,
}
"""The statement of each `other_gradient`, as a formula."""


@pytest.mark.parametrize(("name", "placement"), FOLLOWED_INSTEAD)
def test_other_gradient_is_the_one_the_error_names(name, placement, pair):
    followed = gradient_moments(*pair, CASES[name], placement).mean
    stated = FOLLOWED_INSTEAD[name, placement](*pair)
    torch.testing.assert_close(followed, stated, rtol=0, atol=1e-13)


def test_every_other_gradient_has_its_formula_here():
    stated = {(e.name, str(p)) for e in ESTIMATORS.values() for p in e.claims.other_gradient}
    assert stated == FOLLOWED_INSTEAD.keys()


@every_estimator
@every_placement
def test_check_placement_refuses_exactly_the_biased_pairs(estimator, placement):
    if placement in estimator.claims.exact_gradient:
        check_placement(estimator, placement)
        return
    with pytest.raises(ValueError, match=f"'{placement}' with estimator '{estimator.name}'") as e:
        check_placement(estimator, placement)
    assert estimator.claims.other_gradient[placement] in str(e.value)
    check_placement(estimator, placement, allow_biased_kl=True)


@pytest.mark.parametrize(
    ("name", "placement", "remedy"),
    [
        ("k1", "loss", "use placement 'reward' or placement 'both'"),
        ("k2", "both", "use estimator 'rb' with placement 'both'"),
        ("k3", "loss", "use placement 'both'"),
        ("rb", "reward", "use placement 'both'"),
    ],
)
def test_check_placement_names_the_remedy(name, placement, remedy):
    with pytest.raises(ValueError, match=remedy):
        check_placement(get_estimator(name), placement)


# --- values ---------------------------------------------------------------------------------------


@every_estimator
def test_identical_models_have_kl_exactly_zero(estimator, pair):
    assert on_every_response(estimator, pair.policy, pair.policy).eq(0).all()


@every_estimator
def test_kl_is_of_the_policy_from_the_reference_and_not_the_reverse(estimator, pair):
    policy, ref = pair
    if estimator.claims.unbiased:
        mean = value_moments(policy, ref, estimator).mean
        assert relative_error(mean, exact_kl(ref, policy)) > FALSE
    k = on_every_response(estimator, policy, ref)
    exchanged = estimator(ref.policy_logp(), policy.policy_logp(), policy.tokens, policy.mask)
    if estimator.name != "k2":  # u² knows no direction
        assert relative_error(exchanged, k) > FALSE


@every_estimator
def test_what_padding_holds_does_not_matter(estimator, pair):
    policy, ref = pair
    mask = policy.mask
    padding = ~mask.unsqueeze(-1)
    policy_logp = policy.policy_logp().masked_fill(padding, torch.nan).requires_grad_()
    ref_logp = ref.policy_logp().masked_fill(padding, -torch.inf)
    k = estimator(policy_logp, ref_logp, policy.tokens.masked_fill(~mask, -100), mask)
    assert torch.equal(k, on_every_response(estimator, policy, ref))
    assert k[~mask].eq(0).all()

    k.sum().backward()
    assert policy_logp.grad is not None
    assert policy_logp.grad.isfinite().all()
    assert policy_logp.grad.masked_select(padding).eq(0).all()


@every_estimator
def test_order_of_the_batch_does_not_matter(estimator, pair):
    policy, ref = pair
    order = torch.randperm(len(policy.tokens), generator=torch.Generator().manual_seed(0))
    k = on_every_response(estimator, policy, ref)
    batch = (policy.policy_logp(), ref.policy_logp(), policy.tokens, policy.mask)
    assert torch.equal(estimator(*(x[order] for x in batch)), k[order])


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_sampled_estimators_are_the_same_from_token_logp_alone(name, pair):
    estimator = get_estimator(name)
    assert isinstance(estimator, SampledEstimator)
    policy, ref = pair
    index = policy.tokens.unsqueeze(-1)
    token_logp = [lm.policy_logp().gather(-1, index).squeeze(-1) for lm in (policy, ref)]
    k = estimator.from_token_logp(*token_logp)
    assert torch.equal(k[policy.mask], on_every_response(estimator, policy, ref)[policy.mask])


def test_rb_sums_over_the_vocabulary_also_where_all_axes_have_one_size():
    logits = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    policy_logp, ref_logp = logits.log_softmax(-1)
    k = get_estimator("rb")(
        policy_logp, ref_logp, torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 3).bool()
    )
    for b in range(3):
        for t in range(3):
            p, q = policy_logp[b, t].exp(), ref_logp[b, t].exp()
            expected = sum(p[v] * (p[v] / q[v]).log() for v in range(3))
            torch.testing.assert_close(k[b, t], expected)


def test_nothing_is_clamped():
    for name, expected in {"k1": -100.0, "k2": 5000.0, "k3": math.exp(100) - 101}.items():
        estimator = get_estimator(name)
        assert isinstance(estimator, SampledEstimator)
        k = estimator.from_token_logp(torch.tensor([-101.0]), torch.tensor([-1.0]))
        torch.testing.assert_close(k, torch.tensor([expected]))


def test_k3_misses_the_reference_mass_where_the_policy_has_none():
    policy = TabularLM(torch.tensor([[0.0, 0.0, -torch.inf]]), length=1)
    ref = TabularLM(torch.tensor([[0.2, 0.3, 0.5]]).log(), length=1)
    k1, k3 = (value_moments(policy, ref, get_estimator(name)).mean for name in ("k1", "k3"))
    torch.testing.assert_close(k1, exact_kl(policy, ref))
    torch.testing.assert_close(k3, exact_kl(policy, ref) - 0.5)


# --- head and tail --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk", "topk_bucket"])
def test_a_head_of_the_whole_vocabulary_is_rb(name, pair):
    rb = get_estimator("rb")
    for k in (VOCAB_SIZE, 100):
        whole = replace(get_estimator(name), k=k)
        expected = on_every_response(rb, *pair)
        torch.testing.assert_close(on_every_response(whole, *pair), expected)
        for placement in KLPlacement:
            torch.testing.assert_close(
                gradient_moments(*pair, whole, placement), gradient_moments(*pair, rb, placement)
            )


def test_a_larger_head_leaves_less_variance_and_a_tighter_bound(pair):
    def with_head(name: str, k: int) -> Estimator:
        return replace(get_estimator(name), k=k)

    policy, ref = (TabularLM(lm.logits[:1], length=1) for lm in pair)
    topk = [value_moments(policy, ref, with_head("topk", k)).variance for k in (1, 2, 3, 4)]
    assert topk[3] < 1e-30
    assert topk[3] < topk[2] < topk[1]
    bounds = [value_moments(policy, ref, with_head("topk_bucket", k)).mean for k in (1, 2, 3)]
    assert bounds[0] <= bounds[1] <= bounds[2]
    torch.testing.assert_close(bounds[2], exact_kl(policy, ref))  # a tail of one token


def test_topk_keeps_a_small_log_ratio_of_the_tail():
    policy_logp = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    ref_logp = policy_logp - torch.tensor([0.0, 0.0, 1e-13])
    k = replace(get_estimator("topk"), k=1)(
        policy_logp, ref_logp, torch.tensor([[2]]), torch.tensor([[True]])
    )
    assert k.item() == pytest.approx(1e-13, rel=1e-2)  # and not (1 + 1e-13) - 1


@pytest.mark.parametrize("name", ["topk", "topk_bucket"])
def test_tokens_that_the_policy_excludes_have_no_say(name):
    policy_logp = torch.tensor([[[0.0, 0.0, -torch.inf, -torch.inf, -torch.inf]]])
    policy_logp = policy_logp.log_softmax(-1).requires_grad_()
    ref_logp = torch.tensor([[[0.2, 0.3, 0.5, 0.0, 0.0]]]).log()
    for k in (2, 3):
        estimate = replace(get_estimator(name), k=k)(
            policy_logp, ref_logp, torch.tensor([[1]]), torch.tensor([[True]])
        )
        assert estimate.item() == pytest.approx(math.log(0.5) - math.log(0.2 * 0.3) / 2)
        (gradient,) = torch.autograd.grad(estimate.sum(), policy_logp)
        assert gradient[..., :2].isfinite().all()
        assert not gradient[..., 2:].isnan().any()


@pytest.mark.parametrize("name", ["topk", "topk_bucket"])
def test_a_head_without_tokens_is_refused(name):
    with pytest.raises(ValueError, match=r"k is 0; .* use k >= 1"):
        replace(get_estimator(name), k=0)


# --- variance of the value ------------------------------------------------------------------------


def test_rb_varies_less_than_k1_on_random_models(pair):
    rb, k1 = (value_moments(*pair, get_estimator(name)).variance for name in ("rb", "k1"))
    assert rb < k1


def test_rb_can_vary_more_than_k1_over_a_sequence(two_steps):
    k1, rb = (value_moments(*two_steps, get_estimator(name)) for name in ("k1", "rb"))
    torch.testing.assert_close(k1.mean, rb.mean)
    # The numbers of the docstring of RaoBlackwellEstimator, which others quote.
    figures = [round(x.item(), 5) for x in (rb.mean, k1.variance, rb.variance)]
    assert figures == [2.39545, 3.31591, 5.06974]


# --- registry -------------------------------------------------------------------------------------


def test_unknown_estimator_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"'kl3' is unknown; use one of k1, k2, k3, rb"):
        get_estimator("kl3")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_found_by_their_name_and_cannot_be_changed(name):
    estimator = get_estimator(name)
    assert estimator is ESTIMATORS[name]
    assert estimator.name == name
    with pytest.raises(AttributeError):
        estimator.name = "other"


# --- what does not fit ----------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize("rows", [VOCAB_SIZE - 1, VOCAB_SIZE + 1])
def test_vocabularies_of_different_size_are_refused_by_name(estimator, rows, pair):
    policy = pair.policy
    ref_logp = torch.randn(*policy.tokens.shape, rows).log_softmax(-1)
    tokens = torch.zeros_like(policy.tokens)
    with pytest.raises(ValueError, match=f"policy_logp has a vocabulary of {VOCAB_SIZE} and ref_l"):
        estimator(policy.policy_logp(), ref_logp, tokens, policy.mask)


@every_estimator
def test_shapes_that_would_be_broadcast_are_refused(estimator, pair):
    policy, ref = pair
    logps = policy.policy_logp(), ref.policy_logp()
    for tokens, mask in (
        (policy.tokens[:1], policy.mask),
        (policy.tokens[..., None], policy.mask),
        (policy.tokens, policy.mask[:, :1]),
    ):
        with pytest.raises(ValueError, match=r"pass \[B, T, V\], \[B, T, V\], \[B, T\] and"):
            estimator(*logps, tokens, mask)


@every_estimator
def test_a_mask_of_numbers_is_refused_since_tokens_in_its_place_would_pass_for_one(estimator, pair):
    policy, ref = pair
    with pytest.raises(ValueError, match=r"mask is torch.int64; pass a bool one"):
        estimator(policy.policy_logp(), ref.policy_logp(), policy.mask, policy.tokens)


@every_estimator
def test_log_probs_of_16_bits_are_measured_in_float32(estimator, pair):
    policy, ref = pair
    logps = [lm.policy_logp().bfloat16() for lm in (policy, ref)]
    k = estimator(*logps, policy.tokens, policy.mask)
    assert k.dtype == torch.float32
    whole = estimator(*(x.double() for x in logps), policy.tokens, policy.mask)
    torch.testing.assert_close(k.double(), whole, rtol=1e-5, atol=1e-6)


def test_topk_of_the_whole_vocabulary_keeps_the_digits_of_a_small_kl():
    logits = 3 * torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(0))
    moved = logits + 1.5e-3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    tokens, mask = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.bool)
    topk = get_estimator("topk")
    exact = topk(logits.log_softmax(-1), moved.log_softmax(-1), tokens, mask)
    assert exact.mean() < 2e-6
    float32 = topk(logits.float().log_softmax(-1), moved.float().log_softmax(-1), tokens, mask)
    torch.testing.assert_close(float32.double(), exact, rtol=1e-3, atol=0)


@every_estimator
@pytest.mark.parametrize("which", ["policy_logp", "ref_logp"])
def test_logits_in_place_of_log_probs_are_refused(estimator, which, pair):
    """A sampled log-ratio of logits is wrong by the difference of their log-sums."""
    policy, ref = pair
    logps = {"policy_logp": policy.policy_logp(), "ref_logp": ref.policy_logp()}
    logps[which] = logps[which] + 0.7
    with pytest.raises(ValueError, match=rf"{which}\[0, 0\] is no distribution: log Σ exp .* 0.7"):
        estimator(**logps, tokens=policy.tokens, mask=policy.mask)


def test_a_compiled_loop_has_no_break_at_an_estimator(pair):
    policy, ref = pair
    arguments = policy.policy_logp(), ref.policy_logp(), policy.tokens, policy.mask
    compiled = torch.compile(get_estimator("k1"), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), get_estimator("k1")(*arguments))
