"""The fused statistics against float64 log-softmax and autograd: outputs, dtypes, shapes."""

import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.kl import (
    ModuleHead,
    OutputHead,
    TokenLogp,
    fused_logp_loss,
    fused_token_logp,
    fused_token_loss,
    fused_token_stats,
)
from rlkl.kl.fused import tiles
from tests.kl.fused.cases import (
    STATISTICS,
    TOLERANCE,
    assert_close,
    combine,
    gradients,
    make,
    naive,
    weights,
)


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


@pytest.mark.usefixtures("small_tiles")
def test_tiles_give_the_same_bits_whichever_thread_reads_them(threads, monkeypatch):
    case, read = make(), tiles.Tile.read

    def at_times_slow(*args: Any) -> tiles.Part:
        time.sleep(random.choice([0, 0.001]))
        return read(*args)

    first = fused_token_stats(*case.positional, **case.bias)
    monkeypatch.setattr(tiles.Tile, "read", at_times_slow)
    for _ in range(5):
        again = fused_token_stats(*case.positional, **case.bias)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


def test_on_logits_sees_each_row_once_and_changes_no_bit(threads):
    case, seen = make(), []
    policy, leaves = case.leaves()

    def keep(rows: slice, *logits: torch.Tensor) -> None:
        assert not torch.is_grad_enabled()
        seen.append((rows, *(x.clone() for x in logits)))

    options = policy.bias | {"temperature": 0.7, "chunk_size": 8}
    expected = fused_token_stats(*policy.positional, **options, whole_rows=True)
    got = fused_token_stats(*policy.positional, **options, on_logits=keep)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    gradients(combine(got, *weights(29)), leaves)  # multiplies the logits again, and shows none
    assert [rows for rows, *_ in seen] == [slice(i, min(i + 8, 29)) for i in range(0, 29, 8)]
    for model, found in zip(
        ("policy", "ref"), zip(*(x for _, *x in seen), strict=True), strict=True
    ):
        hidden, head, bias = (getattr(case, f"{model}_{x}") for x in ("hidden", "head", "bias"))
        torch.testing.assert_close(torch.cat(found), (hidden @ head.T + bias) / 0.7)


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


@pytest.mark.parametrize("part", range(7))
def test_backward_refuses_what_was_changed_in_place_since(part):
    case, (_, leaves) = make(), make().leaves()
    policy = leaves[0], OutputHead(*leaves[1:])
    ref = OutputHead(case.ref_head, case.ref_bias)
    module = torch.nn.Linear(7, 101).requires_grad_(False)
    kl = fused_token_stats(*policy, case.ref_hidden, ref, case.tokens).kl.sum()
    kl += fused_token_stats(*policy, leaves[0], ModuleHead(module, 101), case.tokens).kl.sum()
    torch.autograd.grad(kl, leaves, retain_graph=True)
    changed = [*leaves, case.tokens, case.ref_hidden, case.ref_head, module.weight][part]
    with torch.no_grad():
        changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(kl, leaves)


def test_a_reference_measured_in_inference_mode_serves_a_gradient():
    case = make()
    policy, leaves = case.leaves()
    expected = gradients(naive(policy).kl.sum(), leaves)
    with torch.inference_mode():
        ref_hidden = case.ref_hidden * 1
    stats = fused_token_stats(*policy._replace(ref_hidden=ref_hidden).positional, **policy.bias)
    assert_close(gradients(stats.kl.sum(), leaves), expected, 1e-11, 1e-11)


@pytest.mark.parametrize("in_one_pass", [False, True])
def test_second_derivatives_are_refused_where_they_would_be_silently_wrong(in_one_pass):
    """An upstream gradient that is a constant: torch's once_differentiable raises nothing."""
    policy, leaves = make().leaves()
    if in_one_pass:
        loss, _ = fused_token_loss(combine, *policy.positional, *weights(29), **policy.bias)
    else:
        loss = combine(fused_token_stats(*policy.positional, **policy.bias), *weights(29))
    penalised = leaves[0].sum() + loss  # a graph that has second derivatives otherwise
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(penalised, leaves, create_graph=True)


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
@settings(max_examples=60)
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
    for whole_rows in (False, True):
        alone = fused_token_stats(
            *case.positional, **case.bias, chunk_size=chunk_size, whole_rows=whole_rows
        )
        assert_close(alone, expected, 1e-10, 1e-10)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("chunk_size", [None, 8, 3])
def test_whole_rows_have_the_bits_of_the_loss_in_the_same_chunks(chunk_size, threads):
    case, w = make(n=64, vocab=997).to(torch.float32), weights(64)
    whole = {"whole_rows": True, "chunk_size": chunk_size}
    alone = fused_token_stats(*case.positional, **case.bias, **whole)
    own = case.policy_hidden, case.policy_head, case.tokens
    policy_bias = {"policy_bias": case.policy_bias}
    policy = fused_token_logp(*own, **policy_bias, **whole)
    _, stats = fused_token_loss(combine, *case.positional, *w, **case.bias, chunk_size=chunk_size)
    _, logp = fused_logp_loss(combine, *own, *w, **policy_bias, chunk_size=chunk_size)
    assert all((x == y).all() for x, y in zip(alone, stats, strict=True))
    assert all((x == y).all() for x, y in zip(policy, logp, strict=True))
    assert (alone.policy_logp == policy.policy_logp).all()


def test_no_tokens_give_empty_statistics_and_zero_loss():
    case = make(n=0)
    policy, leaves = case.leaves()
    loss, stats = fused_token_loss(combine, *policy.positional, *weights(0), **policy.bias)
    assert loss == 0
    for empty in (stats, fused_token_stats(*case.positional)):
        assert [x.shape for x in empty] == [(0,)] * 4
    assert all((x == 0).all() for x in gradients(loss, leaves))


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
