"""Zero is zero, small is small, far apart is finite, and nothing is rounded unasked."""

import math

import pytest
import torch

from rlkl.kl import (
    fused_token_logp,
    fused_token_loss,
    fused_token_stats,
    get_divergence,
)
from rlkl.kl.fused import engine, tiles
from tests.kl.fused.cases import (
    Case,
    assert_close,
    combine,
    gradients,
    make,
    naive,
    shifted,
    weights,
)

pytestmark = pytest.mark.usefixtures("small_tiles", "passes")


@pytest.fixture(params=[False, True], ids=["tiles", "whole_rows"])
def whole_rows(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("gemm_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_models_have_exactly_zero_kl_and_gradient(dtype, gemm_dtype, whole_rows):
    case = make(n=64, vocab=503)
    case = case._replace(ref_hidden=case.policy_hidden, ref_head=case.policy_head)
    for forbidden in (0, 5):
        case.policy_bias[:forbidden] = -torch.inf
        tokens = case.tokens.clamp(min=forbidden)
        same = case._replace(ref_bias=case.policy_bias, tokens=tokens).to(dtype)
        policy, leaves = same.leaves()
        stats = fused_token_stats(
            *policy.positional,
            **policy.bias,
            temperature=0.7,
            whole_rows=whole_rows,
            gemm_dtype=gemm_dtype,
        )
        assert (stats.kl == 0).all()
        assert (stats.policy_logp == stats.ref_logp).all()
        assert all((x == 0).all() for x in gradients(stats.kl.sum(), leaves))


@pytest.mark.parametrize("size", [3e-2, 3e-3, 5e-4])
def test_small_kl_keeps_its_digits_where_the_direct_formula_has_none(size, whole_rows):
    # Multiples of powers of two, small enough that float32 logits are exact: what is left is ours.
    case = make(n=64, vocab=997, hidden=4)
    hidden = (case.policy_hidden * 4).round().clamp(-8, 8)
    head = (case.policy_head * 64).round() / 512
    ref_head = shifted(case, size / 2**2).ref_head - case.policy_head
    ref_head = head + (ref_head * 2**17).round() / 2**17
    bias = torch.zeros(997)
    case = Case(hidden, head, bias, hidden, ref_head, bias, case.tokens)
    single = case.to(torch.float32)
    stats = fused_token_stats(*single.positional, whole_rows=whole_rows)
    policy, ref = ((hidden @ x.T).log_softmax(-1) for x in (head, ref_head))
    truth = (policy.exp() * ((policy - ref) + torch.expm1(ref - policy))).sum(-1)
    assert (stats.kl >= 0).all()
    error = ((stats.kl - truth) / truth).abs()
    assert error.max() < 1e-3
    assert error.median() < 1e-4
    if size == 5e-4:
        assert truth.median() < 5e-7
        direct = naive(single).kl
        assert ((direct - truth) / truth).abs().median() > 0.1
        assert (direct < 0).any()


@pytest.mark.parametrize("divergence", ["rkl", "known", "fkl", "akl", "js", "skew_rkl"])
def test_nearly_certain_tokens_keep_the_digits_of_their_gradients(divergence):
    """Their t is as small as what rounding leaves of the mean of b − a, here 6.1."""
    logits = torch.tensor([[0.0, -14.0], [0.0, -15.3], [0.0, -13.7]], dtype=torch.float32)
    ref = torch.tensor([[6.1, -6.3], [6.3, -7.1], [7.7, -7.8]], dtype=torch.float32)
    name = "rkl" if divergence == "known" else divergence
    truth = logits.double().requires_grad_()
    expected = get_divergence(name)(truth, ref.double())
    assert 1e-8 < expected.min() < expected.max() < 5e-6
    (gradient,) = gradients(expected.sum(), [truth])
    head, identity, tokens = logits.T.clone().requires_grad_(), torch.eye(3).float(), torch.zeros(3)
    inputs = identity, head, identity, ref.T.contiguous(), tokens.long()
    if divergence == "known":
        known = fused_token_stats(*inputs).ref_logp
        loss, _ = fused_token_loss(lambda stats: stats.kl.sum(), *inputs, ref_logp=known)
    else:
        kl = fused_token_stats(*inputs, divergence=name).kl
        assert_close([kl], [expected.float()], 1e-4, 0)
        loss = kl.sum()
    assert_close(gradients(loss, [head]), [gradient.T.float()], 1e-4, 0)


def test_kl_is_never_negative_whatever_the_rounding(whole_rows):
    for size in (1e-4, 1e-5, 1e-6, 1e-7):
        case = shifted(make(n=200, vocab=500), size).to(torch.float32)
        assert (fused_token_stats(*case.positional, whole_rows=whole_rows).kl >= 0).all()


@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
def test_far_apart_models_neither_overflow_nor_lose_the_reference_mass(scale, whole_rows):
    case = make()
    case = case._replace(
        policy_hidden=case.policy_hidden * scale, ref_hidden=case.ref_hidden * scale
    )
    single = case.to(torch.float32)
    truth, leaves = single.to(torch.float64).leaves()
    expected = naive(truth)
    expected_gradients = gradients(combine(expected, *weights(29)), leaves)
    policy, leaves = single.leaves()
    stats = fused_token_stats(
        *policy.positional, **policy.bias, chunk_size=10, whole_rows=whole_rows
    )
    assert_close(stats, expected, 1e-5, 1e-5 * scale)
    # Logits of this size are themselves rounded, and p as they are: allow that, and three times
    # what it does to the naive, which may be lucky.
    logits = truth.policy_hidden.detach() @ truth.policy_head.detach().T
    rounding = torch.finfo(torch.float32).eps * float(logits.abs().max())
    rounded, rounded_leaves = single.leaves()
    rounded_gradients = gradients(combine(naive(rounded), *weights(29)), rounded_leaves)
    got = gradients(combine(stats, *weights(29)), leaves)
    for x, y, z in zip(got, rounded_gradients, expected_gradients, strict=True):
        assert (x - z).norm() < 3 * (y - z).norm() + rounding * z.norm()


@pytest.mark.parametrize("of_all_ref_logits", [0.0, 30.0])
@pytest.mark.parametrize("lower", [5.0, 12.0, 20.0])
def test_mass_of_the_reference_where_the_policy_underflows_is_not_lost(
    lower, of_all_ref_logits, whole_rows
):
    logits = torch.tensor([[0.0], [-90.0]], dtype=torch.float32)
    ref = torch.tensor([[0.0], [-lower]], dtype=torch.float32) + of_all_ref_logits
    hidden, tokens = torch.ones(1, 1, dtype=torch.float32), torch.tensor([0])
    kl = fused_token_stats(hidden, logits, hidden, ref, tokens, whole_rows=whole_rows).kl
    assert kl.item() == pytest.approx(math.log1p(math.exp(-lower)), rel=1e-5)


@pytest.mark.parametrize("forbidden_in_ref", [True, False])
def test_tokens_the_policy_forbids_count_for_nothing(forbidden_in_ref, threads):
    case = make()
    case.policy_bias[:40] = -torch.inf
    if forbidden_in_ref:
        case.ref_bias[:40] = -torch.inf
    case = case._replace(tokens=case.tokens.clamp(min=40))
    truth, leaves = case.leaves()
    expected = naive(truth)
    w = weights(29)
    expected_gradients = gradients(combine(expected, *w), leaves[:2])
    assert all(x.isfinite().all() for x in expected_gradients)
    policy, leaves = case.leaves()
    loss, stats = fused_token_loss(combine, *policy.positional, *w, **policy.bias, chunk_size=10)
    assert_close(stats, expected, 1e-11, 1e-11)
    assert_close(gradients(loss, leaves[:2]), expected_gradients, 1e-11, 1e-11)
    assert_close(fused_token_stats(*case.positional, **case.bias), expected, 1e-11, 1e-11)
    alone = fused_token_logp(
        case.policy_hidden, case.policy_head, case.tokens, policy_bias=case.policy_bias
    )
    assert_close(alone, (expected.policy_logp, expected.entropy), 1e-11, 1e-11)


@pytest.mark.parametrize("forbidden", [slice(85), slice(30, None), slice(50, 90)])
@pytest.mark.parametrize("divergence", ["rkl", "akl"])
def test_rows_with_tokens_that_both_forbid_are_read_as_others_are(
    forbidden, divergence, whole_rows, monkeypatch
):
    """Whole tiles of such tokens too."""
    case = make()
    case.policy_bias[forbidden] = case.ref_bias[forbidden] = -torch.inf
    allowed = case.policy_bias.isfinite()
    case = case._replace(tokens=allowed.nonzero()[:, 0][case.tokens % int(allowed.sum())])
    rest = case._replace(
        policy_head=case.policy_head[allowed],
        policy_bias=case.policy_bias[allowed],
        ref_head=case.ref_head[allowed],
        ref_bias=case.ref_bias[allowed],
        tokens=(allowed.cumsum(0) - 1)[case.tokens],
    )
    truth, leaves = rest.leaves()
    options = {"divergence": divergence, "whole_rows": whole_rows}
    expected = fused_token_stats(*truth.positional, **truth.bias, **options)
    hidden_gradient, head_gradient, _ = gradients(combine(expected, *weights(29)), leaves)
    monkeypatch.delattr(engine.Chunk, "_far_divergence")
    for dtype in (torch.float64, torch.float32):
        policy, leaves = case.to(dtype).leaves()
        with torch.no_grad(), monkeypatch.context() as patch:
            if not whole_rows:
                patch.delattr(tiles, "sweep")
            fused_token_stats(*policy.positional, **policy.bias, whole_rows=whole_rows)
        stats = fused_token_stats(*policy.positional, **policy.bias, **options)
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        assert_close(stats, expected, tolerance, tolerance)
        found = gradients(combine(stats, *weights(29)), leaves)
        assert (found[1][~allowed] == 0).all()
        assert_close([found[0], found[1][allowed]], [hidden_gradient, head_gradient], 1e-4, 1e-4)


@pytest.mark.parametrize("forbidden_in_ref", [True, False])
def test_the_reference_keeps_its_log_probability_of_a_token_the_policy_forbids(
    forbidden_in_ref, whole_rows
):
    case = make()
    case.policy_bias[:5] = -torch.inf
    if forbidden_in_ref:
        case.ref_bias[:5] = -torch.inf
    case = case._replace(tokens=torch.full((29,), 3))
    stats, expected = (
        fused_token_stats(*case.positional, **case.bias, whole_rows=whole_rows),
        naive(case),
    )
    assert (stats.policy_logp == -torch.inf).all()
    assert_close(stats, expected, 1e-11, 1e-11)


def test_kl_is_infinite_where_the_reference_forbids_what_the_policy_allows(whole_rows):
    case = make()
    case.ref_bias[3] = -torch.inf
    stats = fused_token_stats(*case.positional, **case.bias, whole_rows=whole_rows)
    assert (stats.kl == torch.inf).all()
    assert stats.policy_logp.isfinite().all()
    assert stats.entropy.isfinite().all()


@pytest.mark.parametrize(("policy_bias", "ref_bias"), [(-50.0, -1e9), (-150.0, -3e38)])
def test_a_finite_mask_of_the_reference_costs_what_the_policy_still_gives(
    policy_bias, ref_bias, whole_rows
):
    case = make()
    case.policy_bias[:5], case.ref_bias[:5] = policy_bias, ref_bias
    single = case._replace(tokens=case.tokens.clamp(min=5)).to(torch.float32)
    truth, leaves = single.to(torch.float64).leaves()
    expected = naive(truth)
    assert expected.kl.max() < 100
    expected_gradients = gradients(expected.kl.sum(), leaves)
    policy, leaves = single.leaves()
    stats = fused_token_stats(*policy.positional, **policy.bias, whole_rows=whole_rows)
    assert_close(stats, expected, 2e-5, 2e-5)
    assert_close(gradients(stats.kl.sum(), leaves), expected_gradients, 1e-4, 1e-4)


def test_bfloat16_products_keep_float32_logits():
    # Factors that are bfloat16 numbers already: the logits must be exact to float32.
    case = shifted(make(n=64, vocab=503, hidden=64), 1.0).to(torch.bfloat16)
    case = case._replace(policy_hidden=case.policy_hidden / 8, ref_hidden=case.ref_hidden / 8)
    truth, leaves = case.to(torch.float64).leaves()
    expected = naive(truth)
    expected_gradients = gradients(expected.kl.sum(), leaves)
    policy, leaves = case.to(torch.float32).leaves()
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert before != "bf16"
    stats = fused_token_stats(*policy.positional, **policy.bias, gemm_dtype=torch.bfloat16)
    assert_close(stats, expected, 1e-5, 1e-5)
    for x, y in zip(gradients(stats.kl.sum(), leaves), expected_gradients, strict=True):
        assert (x - y).norm() < 1e-2 * y.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_products_are_not_rounded_unasked():
    # Large enough for oneDNN to take the product, were it allowed to.
    case = make(n=64, vocab=503, hidden=64, ref=64)
    case = case._replace(policy_hidden=case.policy_hidden / 8, ref_hidden=case.ref_hidden / 8)
    for dtype, temperature in ((torch.float32, 1.0), (torch.bfloat16, 0.7)):
        given = case.to(dtype)
        stats = fused_token_stats(*given.positional, **given.bias, temperature=temperature)
        expected = naive(given.to(torch.float64), temperature)
        assert_close(stats, expected, 2e-5, 2e-5)


def test_a_float32_reference_beside_a_bfloat16_policy_is_not_rounded(threads):
    # The policy's products may round their factors, which loses nothing; the reference's may not.
    case = make(n=64, vocab=503, hidden=64, ref=64)
    case = case._replace(policy_hidden=case.policy_hidden / 8, ref_hidden=case.ref_hidden / 8)
    case = Case(
        *(
            x.to(torch.float32 if name.startswith("ref") else torch.bfloat16)
            if x.is_floating_point()
            else x
            for name, x in case._asdict().items()
        )
    )
    expected = naive(case.to(torch.float64))
    before = torch.backends.mkldnn.matmul.fp32_precision
    for _ in range(5):  # were the setting each thread's to change, it might be the other's
        stats = fused_token_stats(*case.positional, **case.bias)
        assert_close(stats, expected, 2e-5, 2e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
