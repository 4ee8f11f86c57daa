"""The single pass where log q(y) is known from before: the reference is not normalised again."""

import pytest
import torch

from rlkl.kl import TopK, fused_token_loss, fused_token_stats
from tests.kl.fused.cases import (
    TOLERANCE,
    Case,
    assert_close,
    combine,
    gradients,
    make,
    naive,
    shifted,
    weights,
)

pytestmark = pytest.mark.usefixtures("passes")


def kl_sum(stats):
    return stats.kl.sum()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_statistics_and_gradients_are_those_of_float64_autograd(dtype, temperature, threads):
    case, w = make().to(dtype), weights(29)
    truth, leaves = case.to(torch.float64).leaves()
    expected = naive(truth, temperature)
    expected_gradients = gradients(combine(expected, *w), leaves)
    policy, leaves = case.leaves()
    options = {**policy.bias, "temperature": temperature}
    known = fused_token_stats(*policy.positional, **options).ref_logp
    loss, stats = fused_token_loss(
        combine, *policy.positional, *w, ref_logp=known, chunk_size=8, **options
    )
    tight = min(TOLERANCE[dtype], 2e-5)
    assert_close(stats, expected, tight, tight)
    assert (stats.ref_logp == known).all()
    assert_close(gradients(loss, leaves), expected_gradients, TOLERANCE[dtype], TOLERANCE[dtype])


def test_gradcheck_against_finite_differences():
    case, w = make(n=3, vocab=5, hidden=2, ref=2), weights(3)
    known = fused_token_stats(*case.positional, **case.bias, temperature=1.3).ref_logp
    _, leaves = case.leaves()

    def in_one_pass(hidden, head, bias):
        return fused_token_loss(
            combine, hidden, head, case.ref_hidden, case.ref_head, case.tokens, *w, ref_logp=known,
            policy_bias=bias, ref_bias=case.ref_bias, temperature=1.3, chunk_size=2,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(in_one_pass, leaves)


@pytest.mark.parametrize("gemm_dtype", [None, torch.bfloat16])
def test_identical_models_have_exactly_zero_kl_and_gradient(gemm_dtype):
    case = make(n=64, vocab=503).to(torch.float32)
    case = case._replace(ref_hidden=case.policy_hidden, ref_head=case.policy_head)
    policy, leaves = case.leaves()
    known = fused_token_stats(*policy.positional, whole_rows=True, gemm_dtype=gemm_dtype).ref_logp
    loss, stats = fused_token_loss(
        kl_sum, *policy.positional, ref_logp=known, gemm_dtype=gemm_dtype
    )
    assert (stats.kl == 0).all()
    assert all((x == 0).all() for x in gradients(loss, leaves[:2]))


def test_small_kl_keeps_the_digits_of_its_gradient_but_not_of_its_value():
    # Multiples of powers of two, small enough that float32 logits are exact: what is left is ours.
    case = make(n=64, vocab=997, hidden=4)
    hidden, head = (case.policy_hidden * 4).round().clamp(-8, 8), (case.policy_head * 64).round()
    ref_head = (shifted(case, 5e-4 / 2**2).ref_head - case.policy_head) * 2**17
    head, ref_head, bias = head / 512, head / 512 + ref_head.round() / 2**17, torch.zeros(997)
    case = Case(hidden, head, bias, hidden, ref_head, bias, case.tokens)
    truth, leaves = case.leaves()
    expected = fused_token_stats(*truth.positional).kl
    (expected_gradient, _) = gradients(expected.sum(), leaves[:2])
    assert expected.median() < 5e-7
    single = case.to(torch.float32)
    policy, leaves = single.leaves()
    known = fused_token_stats(*single.positional).ref_logp
    loss, stats = fused_token_loss(kl_sum, *policy.positional, ref_logp=known)
    (gradient, _) = gradients(loss, leaves[:2])
    assert (stats.kl >= 0).all()
    error = (stats.kl - expected).abs()
    assert error.max() < 2e-6
    assert (error / expected).median() > 1e-2
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()


@pytest.mark.parametrize("forbidden_in_ref", [True, False])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_forbidden_tokens_and_probabilities_that_underflow_count_for_nothing(
    forbidden_in_ref, scale
):
    case = make()
    case.policy_bias[:40] = -torch.inf
    if forbidden_in_ref:
        case.ref_bias[:40] = -torch.inf
    case = case._replace(
        tokens=case.tokens.clamp(min=40),
        policy_hidden=case.policy_hidden * scale,
        ref_hidden=case.ref_hidden * scale,
    )
    truth, leaves = case.leaves()
    expected, w = naive(truth), weights(29)
    expected_gradients = gradients(combine(expected, *w), leaves[:2])
    policy, leaves = case.leaves()
    known = fused_token_stats(*policy.positional, **policy.bias).ref_logp
    loss, stats = fused_token_loss(
        combine, *policy.positional, *w, ref_logp=known, chunk_size=10, **policy.bias
    )
    assert_close(stats, expected, 1e-11, 1e-11)
    assert_close(gradients(loss, leaves[:2]), expected_gradients, 1e-11, 1e-11)


def test_what_is_given_is_given_back_where_rows_are_read_anew():
    case, given = make(), torch.full((29,), -3.0)
    case.ref_bias[3] = -torch.inf
    case = case._replace(tokens=case.tokens.clamp(min=4))
    _, stats = fused_token_loss(kl_sum, *case.positional, ref_logp=given, **case.bias)
    assert (stats.ref_logp == -3).all()
    torch.testing.assert_close(stats.kl, naive(case).kl)


def test_kl_is_infinite_where_the_reference_forbids_what_the_policy_allows():
    case = make()
    case.ref_bias[3] = -torch.inf
    known = fused_token_stats(*case.positional, **case.bias).ref_logp
    _, stats = fused_token_loss(kl_sum, *case.positional, ref_logp=known, **case.bias)
    assert (stats.kl == torch.inf).all()


def test_what_it_does_not_serve_is_refused():
    case = make()
    known = fused_token_stats(*case.positional).ref_logp
    for divergence in ("fkl", TopK(3)):
        with pytest.raises(ValueError, match="leave it None"):
            fused_token_loss(kl_sum, *case.positional, ref_logp=known, divergence=divergence)
    with pytest.raises(ValueError, match=r"ref_logp has shape \(28,\)"):
        fused_token_loss(kl_sum, *case.positional, ref_logp=known[1:])
