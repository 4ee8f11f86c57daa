"""The fused statistics against float64 log-softmax and autograd: outputs, dtypes, shapes."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlkl.kl import (
    TokenLogp,
    TokenStats,
    fused_logp_loss,
    fused_token_logp,
    fused_token_loss,
    fused_token_stats,
)
from rlkl.kl.fused import engine, heads

STATISTICS = ("policy_logp", "kl", "entropy")


class Case(NamedTuple):
    """Arguments of fused_token_stats; different hidden sizes of policy and reference."""

    policy_hidden: Tensor
    policy_head: Tensor
    policy_bias: Tensor
    ref_hidden: Tensor
    ref_head: Tensor
    ref_bias: Tensor
    tokens: Tensor

    @property
    def positional(self) -> tuple[Tensor, ...]:
        return self.policy_hidden, self.policy_head, self.ref_hidden, self.ref_head, self.tokens

    @property
    def bias(self) -> dict[str, Tensor]:
        return {"policy_bias": self.policy_bias, "ref_bias": self.ref_bias}

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(*(x.to(dtype) if x.is_floating_point() else x for x in self))

    def leaves(self) -> tuple["Case", list[Tensor]]:
        """A copy whose policy tensors require gradients."""
        policy = [x.detach().clone().requires_grad_() for x in self[:3]]
        return Case(*policy, *self[3:]), policy


def make(n: int = 29, vocab: int = 101, hidden: int = 7, ref: int = 11, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    tokens = torch.randint(vocab, (n,), generator=g)
    policy = normal(n, hidden), normal(vocab, hidden), normal(vocab)
    return Case(*policy, normal(n, ref), normal(vocab, ref) / 2, normal(vocab), tokens)


def shifted(case: Case, size: float) -> Case:
    """The same policy beside a reference that differs from it by about `size` in every logit."""
    g = torch.Generator().manual_seed(1)
    head = case.policy_head
    ref_head = head + size * torch.randn(head.shape, generator=g, dtype=head.dtype)
    bias = torch.zeros_like(case.policy_bias)
    return Case(case.policy_hidden, head, bias, case.policy_hidden, ref_head, bias, case.tokens)


def naive(case: Case, temperature: float = 1.0) -> TokenStats:
    """The definitions, on the whole [N, V]."""
    policy = (case.policy_hidden @ case.policy_head.T + case.policy_bias) / temperature
    ref = (case.ref_hidden @ case.ref_head.T + case.ref_bias) / temperature
    policy, ref = policy.log_softmax(-1), ref.log_softmax(-1)
    p, possible = policy.exp(), policy > -torch.inf
    token = case.tokens[:, None]
    return TokenStats(
        policy.gather(1, token)[:, 0],
        ref.gather(1, token)[:, 0],
        torch.where(possible, p * (policy.where(possible, 0) - ref.where(possible, 0)), 0).sum(-1),
        -torch.where(possible, p * policy.where(possible, 0), 0).sum(-1),
    )


def combine(stats: TokenStats | TokenLogp, *weights: Tensor) -> Tensor:
    """A loss, not linear in log π(y), with another upstream gradient for every token."""
    loss = (weights[0] * stats.policy_logp.exp() + weights[1] * stats.entropy).sum()
    return loss + (weights[2] * stats.kl).sum() if isinstance(stats, TokenStats) else loss


def weights(n: int) -> Tensor:
    return torch.randn(3, n, generator=torch.Generator().manual_seed(2))


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def assert_close(got, expected, rtol: float, atol: float) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.to(y.dtype), y, rtol=rtol, atol=atol)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and slices that do not divide the sizes used here."""
    monkeypatch.setattr(engine, "_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(heads, "_VOCAB_SLICE", 32)


@pytest.fixture(params=[1, 2], ids="threads{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# The errors are those of the logits and of gradients rounded to the input's own dtype.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_statistics_and_gradients_are_those_of_float64_autograd(dtype, temperature, threads):
    case, w = make().to(dtype), weights(29)
    truth, leaves = case.to(torch.float64).leaves()
    expected = naive(truth, temperature)
    expected_gradients = gradients(combine(expected, *w), leaves)

    policy, leaves = case.leaves()
    stats = fused_token_stats(
        *policy.positional, **policy.bias, temperature=temperature, chunk_size=8
    )
    tight = min(TOLERANCE[dtype], 2e-5)  # logits and sums are float32 whatever the inputs
    assert {x.dtype for x in stats} == {torch.float64 if tight < 1e-6 else torch.float32}
    assert_close(stats, expected, tight, tight)
    got = gradients(combine(stats, *w), leaves)
    assert [x.dtype for x in got] == [dtype] * 3
    assert_close(got, expected_gradients, TOLERANCE[dtype], TOLERANCE[dtype])

    loss, stats = fused_token_loss(
        combine, *policy.positional, *w, **policy.bias, temperature=temperature, chunk_size=8
    )
    torch.testing.assert_close(
        loss.double(), combine(expected, *w), rtol=10 * tight, atol=10 * tight
    )
    assert_close(stats, expected, tight, tight)
    assert_close(gradients(loss, leaves), expected_gradients, TOLERANCE[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_each_statistic_alone_has_its_gradient(statistic):
    case, w = make(), weights(29)[0]
    truth, leaves = case.leaves()
    expected = gradients((w * getattr(naive(truth), statistic)).sum(), leaves)
    policy, leaves = case.leaves()
    stats = fused_token_stats(*policy.positional, **policy.bias, chunk_size=10)
    assert_close(gradients((w * getattr(stats, statistic)).sum(), leaves), expected, 1e-11, 1e-11)


def test_without_a_reference_the_policy_part_is_the_same():
    case, w = make(), weights(29)
    policy, leaves = case.leaves()
    expected = fused_token_stats(*policy.positional, **policy.bias)
    expected = TokenLogp(expected.policy_logp, expected.entropy)
    expected_gradients = gradients(combine(expected, *w), leaves)
    own = policy.policy_hidden, policy.policy_head, policy.tokens
    for chunk_size in (7, 1000):
        options = {"policy_bias": policy.policy_bias, "chunk_size": chunk_size}
        got = fused_token_logp(*own, **options)
        assert_close(got, expected, 1e-12, 1e-12)
        assert_close(gradients(combine(got, *w), leaves), expected_gradients, 1e-11, 1e-11)
        loss, got = fused_logp_loss(combine, *own, *w, **options)
        assert_close(got, expected, 1e-12, 1e-12)
        assert_close(gradients(loss, leaves), expected_gradients, 1e-11, 1e-11)


def test_gradcheck_against_finite_differences():
    case, w = make(n=3, vocab=5, hidden=2, ref=2), weights(3)
    _, leaves = case.leaves()

    def differentiable(hidden, head, bias):
        stats = fused_token_stats(
            hidden, head, case.ref_hidden, case.ref_head, case.tokens,
            policy_bias=bias, ref_bias=case.ref_bias, temperature=1.3, chunk_size=2,
        )  # fmt: skip
        return stats.policy_logp, stats.kl, stats.entropy

    def in_one_pass(hidden, head, bias):
        return fused_token_loss(
            combine, hidden, head, case.ref_hidden, case.ref_head, case.tokens, *w,
            policy_bias=bias, ref_bias=case.ref_bias, temperature=1.3, chunk_size=2,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(differentiable, leaves)
    assert torch.autograd.gradcheck(in_one_pass, leaves)


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    vocab=st.integers(1, 70),
    hidden=st.integers(1, 9),
    ref=st.integers(1, 9),
    chunk_size=st.none() | st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_the_naive_result(n, vocab, hidden, ref, chunk_size, seed):
    torch.set_default_dtype(torch.float64)
    case, w = make(n, vocab, hidden, ref, seed), weights(n)
    truth, leaves = case.leaves()
    expected = naive(truth)
    expected_gradients = gradients(combine(expected, *w), leaves)
    policy, leaves = case.leaves()
    loss, stats = fused_token_loss(
        combine, *policy.positional, *w, **policy.bias, chunk_size=chunk_size
    )
    assert_close(stats, expected, 1e-10, 1e-10)
    assert_close(gradients(loss, leaves), expected_gradients, 1e-10, 1e-10)


def test_no_tokens_give_empty_statistics_and_zero_loss():
    case = make(n=0)
    policy, leaves = case.leaves()
    loss, stats = fused_token_loss(combine, *policy.positional, *weights(0), **policy.bias)
    assert loss == 0
    assert all(x.shape == (0,) for x in stats)
    assert all((x == 0).all() for x in gradients(loss, leaves))


@pytest.mark.parametrize("gemm_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_models_have_exactly_zero_kl_and_gradient(dtype, gemm_dtype):
    case = make(n=64, vocab=503)
    case = case._replace(ref_hidden=case.policy_hidden, ref_head=case.policy_head)
    for forbidden in (0, 5):
        case.policy_bias[:forbidden] = -torch.inf
        tokens = case.tokens.clamp(min=forbidden)
        same = case._replace(ref_bias=case.policy_bias, tokens=tokens).to(dtype)
        policy, leaves = same.leaves()
        stats = fused_token_stats(
            *policy.positional, **policy.bias, temperature=0.7, gemm_dtype=gemm_dtype
        )
        assert (stats.kl == 0).all()
        assert (stats.policy_logp == stats.ref_logp).all()
        assert all((x == 0).all() for x in gradients(stats.kl.sum(), leaves))


@pytest.mark.parametrize("size", [3e-2, 3e-3, 5e-4])
def test_small_kl_keeps_its_digits_where_the_direct_formula_has_none(size):
    # Multiples of powers of two, small enough that float32 logits are exact: what is left is ours.
    case = make(n=64, vocab=997, hidden=4)
    hidden = (case.policy_hidden * 4).round().clamp(-8, 8)
    head = (case.policy_head * 64).round() / 512
    ref_head = shifted(case, size / 2**2).ref_head - case.policy_head
    ref_head = head + (ref_head * 2**17).round() / 2**17
    bias = torch.zeros(997)
    case = Case(hidden, head, bias, hidden, ref_head, bias, case.tokens)
    single = case.to(torch.float32)
    stats = fused_token_stats(*single.positional)
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


def test_kl_is_never_negative_whatever_the_rounding():
    for size in (1e-4, 1e-5, 1e-6, 1e-7):
        case = shifted(make(n=200, vocab=500), size).to(torch.float32)
        assert (fused_token_stats(*case.positional).kl >= 0).all()


@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
def test_far_apart_models_neither_overflow_nor_lose_the_reference_mass(scale):
    case = make()
    case = case._replace(
        policy_hidden=case.policy_hidden * scale, ref_hidden=case.ref_hidden * scale
    )
    single = case.to(torch.float32)
    truth, leaves = single.to(torch.float64).leaves()
    expected = naive(truth)
    expected_gradients = gradients(combine(expected, *weights(29)), leaves)
    policy, leaves = single.leaves()
    stats = fused_token_stats(*policy.positional, **policy.bias, chunk_size=10)
    assert_close(stats, expected, 1e-5, 1e-5 * scale)
    # Logits of this size are themselves rounded: allow three times what that does to the naive.
    rounded, rounded_leaves = single.leaves()
    rounded_gradients = gradients(combine(naive(rounded), *weights(29)), rounded_leaves)
    got = gradients(combine(stats, *weights(29)), leaves)
    for x, y, z in zip(got, rounded_gradients, expected_gradients, strict=True):
        assert (x - z).norm() < 3 * (y - z).norm() + 1e-6 * z.norm()


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
    alone = fused_token_logp(
        case.policy_hidden, case.policy_head, case.tokens, policy_bias=case.policy_bias
    )
    assert_close(alone, (expected.policy_logp, expected.entropy), 1e-11, 1e-11)


def test_kl_is_infinite_where_the_reference_forbids_what_the_policy_allows():
    case = make()
    case.ref_bias[3] = -torch.inf
    stats = fused_token_stats(*case.positional, **case.bias)
    assert (stats.kl == torch.inf).all()
    assert stats.policy_logp.isfinite().all()
    assert stats.entropy.isfinite().all()


def test_padding_rows_of_a_vocabulary_are_cut_and_get_no_gradient():
    case = make()
    policy, leaves = case.leaves()
    expected = fused_token_stats(*policy.positional)
    expected_gradient = gradients(combine(expected, *weights(29)), leaves[:2])
    padded = torch.cat([case.policy_head, torch.full((19, 7), torch.nan)]).requires_grad_()
    ref_head = torch.cat([case.ref_head, torch.full((3, 11), torch.nan)])
    hidden = leaves[0]
    got = fused_token_stats(hidden, padded, case.ref_hidden, ref_head, case.tokens, vocab_size=101)
    assert_close(got, expected, 0, 0)
    hidden_gradient, head_gradient = gradients(combine(got, *weights(29)), [hidden, padded])
    assert_close([hidden_gradient, head_gradient[:101]], expected_gradient, 1e-12, 1e-12)
    assert (head_gradient[101:] == 0).all()


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


def test_autocast_does_not_round_the_logits():
    case = make().to(torch.float32)
    expected = fused_token_stats(*case.positional, **case.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(fused_token_stats(*case.positional, **case.bias), expected, 0, 0)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.usefixtures("small_tiles")
def test_no_tensor_is_larger_than_the_logits_of_a_chunk():
    torch.set_num_threads(1)
    case, chunk_size = make(n=200, vocab=101), 16
    policy, leaves = case.leaves()
    with LargestTensor() as fused:
        loss, _ = fused_token_loss(
            combine, *policy.positional, *weights(200), **policy.bias, chunk_size=chunk_size
        )
        gradients(loss, leaves)
        stats = fused_token_stats(*policy.positional, **policy.bias, chunk_size=chunk_size)
        gradients(stats.kl.sum(), leaves)
    assert fused.numel == 2 * chunk_size * 101  # both models, whatever the number of tokens
    with LargestTensor() as whole:
        naive(case)
    assert whole.numel == 200 * 101


def test_loss_backward_scales_by_the_upstream_scalar_and_only_once():
    case, w = make(), weights(29)
    policy, leaves = case.leaves()
    loss, stats = fused_token_loss(combine, *policy.positional, *w, **policy.bias)
    assert not any(x.requires_grad for x in stats)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves)
    assert_close(thrice, [3 * x for x in once], 1e-14, 1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_loss_under_no_grad_is_the_value_alone():
    case, w = make(), weights(29)
    policy, _ = case.leaves()
    with torch.no_grad():
        loss, _ = fused_token_loss(combine, *policy.positional, *w, **policy.bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, combine(naive(case), *w))


def test_a_loss_that_ignores_the_statistics_of_a_chunk_has_no_gradient_there():
    case = make()
    policy, leaves = case.leaves()
    first = torch.arange(29) < 10

    def loss_fn(stats: TokenStats, mask: Tensor) -> Tensor:
        return stats.kl[mask].sum() if mask.any() else torch.zeros(())

    loss, stats = fused_token_loss(loss_fn, *policy.positional, first, **policy.bias, chunk_size=10)
    hidden_gradient, *_ = gradients(loss, leaves)
    assert torch.allclose(loss, stats.kl[:10].sum())
    assert (hidden_gradient[:10] != 0).any()
    assert (hidden_gradient[10:] == 0).all()


def test_threads_are_left_as_they_were_and_inference_mode_works(threads):
    case = make()
    with torch.inference_mode():
        stats = fused_token_stats(*case.positional, **case.bias, chunk_size=10)
    assert_close(stats, naive(case), 1e-11, 1e-11)
    assert torch.get_num_threads() == threads


BAD = {
    "temperature": {"temperature": 0.0},
    "chunk_size": {"chunk_size": 0},
    "vocab_size": {"vocab_size": 102},
    "gemm_dtype": {"gemm_dtype": torch.float16},
    "CPU": {"gemm_dtype": torch.bfloat16},  # with float64 inputs
    "policy_bias": {"policy_bias": torch.zeros(3)},
    "pass vocab_size": {"ref_head": torch.zeros(103, 11)},
    "ref_hidden": {"ref_hidden": torch.zeros(29, 12)},
    "tokens": {"tokens": torch.full((29,), 101)},
}


@pytest.mark.parametrize("named", BAD)
def test_bad_arguments_are_refused_by_name(named):
    case = make()
    names = ("policy_hidden", "policy_head", "ref_hidden", "ref_head", "tokens")
    arguments = dict(zip(names, case.positional, strict=True)) | BAD[named]
    with pytest.raises(ValueError, match=named):
        fused_token_stats(**arguments)


def test_bad_losses_are_refused_by_name():
    case = make()

    def loss(loss_fn, *per_token):
        return fused_token_loss(loss_fn, *case.positional, *per_token)

    with pytest.raises(ValueError, match=r"per_token\[0\] has shape \(28,\)"):
        loss(combine, torch.zeros(28))
    with pytest.raises(ValueError, match="detach"):
        loss(combine, torch.zeros(29, requires_grad=True))
    with pytest.raises(ValueError, match="return the sum"):
        loss(lambda stats: stats.kl)
