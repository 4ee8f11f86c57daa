"""Every divergence from hidden states against its definition on whole logits, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkl.kl import (
    DIVERGENCES,
    ModuleHead,
    OutputHead,
    TopK,
    fused_divergence,
    fused_token_loss,
    fused_token_stats,
    get_divergence,
)
from rlkl.kl.fused import engine, generators, problem, tiles, torch_rows
from rlkl.kl.fused.generators import row_divergence
from tests.kl.fused.cases import assert_close, gradients, make, naive, shifted, weights

SETTINGS = [
    *map(get_divergence, DIVERGENCES),
    get_divergence("fkl_rkl", weight=0.2),
    get_divergence("js", weight=0.3),
    get_divergence("js", weight=0.3, scaled=True),
    get_divergence("js", weight=0.0),
    get_divergence("js", weight=1.0),
    get_divergence("js", weight=0.0, scaled=True),
    get_divergence("js", weight=1.0, scaled=True),
    get_divergence("skew_fkl", alpha=0.0),
    get_divergence("skew_rkl", alpha=0.5),
    get_divergence("akl", head_mass=0.9, head_rule="reach"),
    get_divergence("akl_r", head_mass=1.0),
]
each = pytest.mark.parametrize(
    "divergence", SETTINGS, ids=lambda d: "-".join(map(str, (d.name, *d.settings.values())))
)


def logits(case, temperature=1.0):
    policy = case.policy_hidden @ case.policy_head.T + case.policy_bias
    return policy / temperature, (case.ref_hidden @ case.ref_head.T + case.ref_bias) / temperature


def assert_is_the_definition(case, divergence, dtype=torch.float64, tolerance=1e-9, **options):
    w = weights(len(case.tokens))[0]
    truth, leaves = case.leaves()
    expected = divergence(*logits(truth, options.get("temperature", 1.0)))
    expected_gradients = gradients((w * expected).sum(), leaves)
    policy, leaves = case.to(dtype).leaves()
    options |= policy.bias
    loss, stats = fused_token_loss(
        lambda stats, w: (w * stats.kl).sum(),
        *policy.positional,
        w,
        divergence=divergence,
        **options,
    )
    assert_close([stats.kl], [expected.detach()], tolerance, tolerance)
    for x, y in zip(gradients(loss, leaves), expected_gradients, strict=True):
        assert (x - y).norm() <= tolerance * (1 + y.norm())
    stats = fused_token_stats(*policy.positional, divergence=divergence, **options)
    for x, y in zip(gradients((w * stats.kl).sum(), leaves), expected_gradients, strict=True):
        assert (x - y).norm() <= tolerance * (1 + y.norm())
    return stats


@pytest.mark.usefixtures("small_tiles")
@each
def test_value_and_gradient_are_those_of_the_definition(divergence):
    case = make()
    stats = assert_is_the_definition(case, divergence, temperature=0.9, chunk_size=8)
    # What does not depend on the divergence stays what it was.
    others = fused_token_stats(*case.positional, **case.bias, temperature=0.9)
    for name in ("policy_logp", "ref_logp", "entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(others, name))
    assert_is_the_definition(make(), divergence, torch.float32, 1e-4, chunk_size=8)


@each
def test_identical_models_have_exactly_no_divergence(divergence):
    case = make(n=16, vocab=301).to(torch.float32)
    case = case._replace(
        ref_hidden=case.policy_hidden, ref_head=case.policy_head, ref_bias=case.policy_bias
    )
    policy, leaves = case.leaves()
    kl = fused_token_stats(*policy.positional, **policy.bias, divergence=divergence).kl
    assert (kl == 0).all()
    assert all((x == 0).all() for x in gradients(kl.sum(), leaves))


@pytest.mark.parametrize("name", [d for d in DIVERGENCES if d != "akl_r"])
def test_small_divergences_keep_their_digits(name):
    case = shifted(make(n=32, vocab=499, hidden=4), 1e-3).to(torch.float32)
    divergence = get_divergence(name)
    truth = divergence(*logits(case.to(torch.float64)))
    assert truth.median() < 1e-5
    # The float32 logits themselves are rounded: by about 1e-7 of 1e-3.
    got = fused_token_stats(*case.positional, **case.bias, divergence=divergence).kl
    assert (got >= 0).all()
    assert ((got - truth) / truth).abs().median() < 1e-3


@each
def test_where_probabilities_underflow_the_definition_still_holds(divergence):
    case = make()
    case = case._replace(policy_hidden=case.policy_hidden * 40, ref_hidden=case.ref_hidden * 40)
    assert_is_the_definition(case, divergence, chunk_size=10)
    single = case.to(torch.float32)
    assert_is_the_definition(single.to(torch.float64), divergence, torch.float32, 2e-3)


@pytest.mark.parametrize("name", ["rkl", "skew_rkl", "js", "akl"])
def test_tokens_that_both_forbid_count_for_nothing(name):
    case = make()
    case.policy_bias[:40] = case.ref_bias[:40] = -torch.inf
    case = case._replace(tokens=case.tokens.clamp(min=40))
    rest = case._replace(
        policy_head=case.policy_head[40:],
        policy_bias=case.policy_bias[40:],
        ref_head=case.ref_head[40:],
        ref_bias=case.ref_bias[40:],
        tokens=case.tokens - 40,
    )
    whole, part = (
        fused_token_stats(*x.positional, **x.bias, divergence=name).kl for x in (case, rest)
    )
    torch.testing.assert_close(whole, part)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("forbidden", [slice(3), slice(85), slice(30, None), slice(0, None, 3)])
@pytest.mark.parametrize("passes", ["numba_rows", "torch_rows"])
@each
def test_tokens_that_the_policy_alone_forbids_are_read_as_others_are(
    divergence, passes, forbidden, monkeypatch
):
    """Whole tiles of such tokens too; what the definition makes infinite is so, read anew."""
    case = make()
    case.policy_bias[forbidden] = -torch.inf
    case.ref_bias[forbidden][1::4] = -torch.inf  # both forbid these
    case.ref_bias[forbidden][2::4] = -40.0
    allowed = case.policy_bias.isfinite()
    case = case._replace(tokens=allowed.nonzero()[:, 0][case.tokens % int(allowed.sum())])
    truth, leaves = case.leaves()
    expected, ref_logp = divergence(*logits(truth, 0.9)), naive(case, 0.9).ref_logp
    w = weights(len(case.tokens))[0]
    expected_gradients = gradients((w * expected).sum(), leaves)
    if row_divergence(divergence).gain is not None:
        assert expected.isfinite().all()
        monkeypatch.delattr(engine.Chunk, "_far_divergence")
    if passes == "torch_rows":
        monkeypatch.setattr(problem, "row_passes", lambda *_: torch_rows)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        policy, leaves = case.to(dtype).leaves()
        for options in ({"whole_rows": False}, {"whole_rows": True, "chunk_size": 8}):
            stats = fused_token_stats(
                *policy.positional, divergence=divergence, temperature=0.9, **options, **policy.bias
            )
            got = stats.kl, stats.ref_logp
            assert_close(got, (expected.detach(), ref_logp), tolerance, tolerance)
            if expected.isfinite().all():
                found = gradients((w * stats.kl).sum(), leaves)
                assert all((x[~allowed] == 0).all() for x in found[1:])
                for x, y in zip(found, expected_gradients, strict=True):
                    assert (x - y).norm() <= 5 * tolerance * (1 + y.norm())


def test_tiles_need_no_whole_rows_where_the_policy_alone_forbids(small_tiles, monkeypatch):
    monkeypatch.delattr(tiles, "sweep")
    case = make()
    case.policy_bias[30:] = -torch.inf
    case = case._replace(tokens=case.tokens % 30)
    expected = naive(case)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        given = case.to(dtype)
        stats = fused_token_stats(*given.positional, **given.bias)
        assert_close(stats, expected, tolerance, tolerance)


@pytest.mark.parametrize("name", ["rkl", "js"])
def test_a_divergence_without_tokens_asks_for_none_that_the_policy_forbids(name, monkeypatch):
    monkeypatch.delattr(engine.Chunk, "_far_divergence")
    case = make()
    case.policy_bias[:5] = -torch.inf
    heads = (OutputHead(case.policy_head, case.policy_bias), OutputHead(case.ref_head))
    got = fused_divergence(case.policy_hidden, heads[0], case.ref_hidden, heads[1], name)
    case.ref_bias.zero_()
    torch.testing.assert_close(got, get_divergence(name)(*logits(case)))


@pytest.mark.parametrize("k", [3, 60])
def test_topk_reads_tokens_that_the_policy_alone_forbids_as_others(k, monkeypatch):
    case = make()
    case.policy_bias[40:] = -torch.inf
    case = case._replace(tokens=case.tokens % 40)
    found = []
    for whole_path in (True, False):
        if not whole_path:
            monkeypatch.delattr(engine.Chunk, "_far_divergence")
        else:
            monkeypatch.setattr(engine, "MAX_T", -1.0)
        policy, leaves = case.leaves()
        stats = fused_token_stats(*policy.positional, **policy.bias, divergence=TopK(k))
        found.append([stats.kl.detach(), *gradients(stats.kl.sum(), leaves)])
        monkeypatch.undo()
    assert_close(*found, 1e-10, 1e-10)


def test_rows_that_do_not_forbid_what_the_first_does_are_right_too():
    """A head that forbids by hidden state."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(make().policy_head)

        def forward(self, hidden):
            forbidden = torch.arange(101) < (hidden[:, :1] > 0) * 20
            return (hidden @ self.weight.T).masked_fill(forbidden, -torch.inf)

    case, head = make(), Head()
    assert (case.policy_hidden[:, 0] > 0).unique().numel() == 2
    case = case._replace(tokens=case.tokens.clamp(min=20))
    for hidden in (case.policy_hidden, -case.policy_hidden):
        for name in ("rkl", "js", "skew_fkl", "skew_rkl"):
            ref = case.ref_hidden @ case.ref_head.T
            expected = get_divergence(name)(head(hidden), ref)
            models = ModuleHead(head, 101), case.ref_hidden, case.ref_head, case.tokens
            stats = fused_token_stats(hidden, *models, divergence=name)
            torch.testing.assert_close(stats.kl, expected)
            found, truth = (gradients(x.sum(), [head.weight]) for x in (stats.kl, expected))
            assert_close(found, truth, 1e-10, 1e-10)


def test_a_head_of_many_tokens_is_found_whole(monkeypatch):
    """Flat references, whose head exceeds what is looked at first."""
    monkeypatch.setattr(generators, "_LIKELY", 4)
    case = make()
    for rule in ("within", "reach"):
        assert_is_the_definition(case, get_divergence("akl", head_mass=0.8, head_rule=rule))


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=30)
@given(
    n=st.integers(1, 20),
    vocab=st.integers(1, 60),
    chunk_size=st.none() | st.integers(1, 30),
    seed=st.integers(0, 99),
    divergence=st.sampled_from(SETTINGS),
)
def test_any_shape_gives_the_definition(n, vocab, chunk_size, seed, divergence):
    torch.set_default_dtype(torch.float64)
    assert_is_the_definition(make(n, vocab, seed=seed), divergence, chunk_size=chunk_size)


def test_two_threads_give_what_one_gives(threads):
    assert_is_the_definition(make(), get_divergence("akl"), chunk_size=8)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_js_at_its_ends_is_exactly_zero(weight):
    case = make(n=200, vocab=50).to(torch.float32)
    case = case._replace(policy_hidden=case.policy_hidden * 4)
    policy, leaves = case.leaves()
    js = get_divergence("js", weight=weight)
    kl = fused_token_stats(*policy.positional, **policy.bias, divergence=js).kl
    assert (kl == 0).all()
    assert all((x == 0).all() for x in gradients(kl.sum(), leaves))


def test_gradcheck_against_finite_differences():
    case = make(n=2, vocab=4, hidden=1, ref=2)
    _, leaves = case.leaves()
    for name in ("fkl", "fkl_rkl", "js", "skew_fkl", "skew_rkl"):  # AKL's weights are held fixed

        def kl(hidden, head, bias, name=name):
            return fused_divergence(
                hidden, OutputHead(head, bias), case.ref_hidden, case.ref_head, name, chunk_size=1
            )

        assert torch.autograd.gradcheck(kl, leaves)


@pytest.mark.parametrize("k", [1, 3, 200])
def test_topk_is_unbiased_in_value_and_gradient(k):
    """Averaged over all tokens with their probabilities it is the exact KL, and so its gradient."""
    case, vocab = make(n=4, vocab=11), 11
    truth, leaves = case.leaves()
    expected = naive(truth).kl
    expected_gradients = gradients(expected.sum(), leaves)
    policy, leaves = case.leaves()
    probabilities = logits(case)[0].softmax(-1)
    total, sums = torch.zeros(4), [torch.zeros_like(x) for x in leaves]
    for token in range(vocab):
        given_token = policy._replace(tokens=torch.full((4,), token))
        options = {"divergence": TopK(k), **policy.bias}
        kl = fused_token_stats(*given_token.positional, **options).kl
        total += probabilities[:, token] * kl.detach()
        parts = gradients((probabilities[:, token].detach() * kl).sum(), leaves)
        for x, part in zip(sums, parts, strict=True):
            x += part
    torch.testing.assert_close(total, expected.detach())
    assert_close(sums, expected_gradients, 1e-10, 1e-10)


def test_topk_of_the_whole_vocabulary_is_the_exact_kl_where_p_underflows_too():
    case = make()
    case = case._replace(policy_hidden=case.policy_hidden * 40, ref_hidden=case.ref_hidden * 40)
    exact = fused_token_stats(*case.positional, **case.bias).kl
    topk = fused_token_stats(*case.positional, **case.bias, divergence=TopK(500)).kl
    torch.testing.assert_close(topk, exact)


@pytest.mark.parametrize("lower", [60.0, 85.0, 100.0, 120.0])
def test_topk_moves_a_token_whose_probability_underflows(lower):
    """By ∂u_y = onehot(y) − p: of the sum over the k likeliest a float32's rounding is left."""
    logits = torch.tensor([0.0, -1.0, -2.0, -lower])
    ref = (logits + torch.tensor([0.1, -0.2, 0.3, 0.4]))[:, None]
    found = []
    for dtype in (torch.float64, torch.float32):
        head = logits[:, None].to(dtype).requires_grad_()
        hidden, tokens = torch.ones(1, 1, dtype=dtype), torch.tensor([3])
        kl = fused_token_stats(hidden, head, hidden, ref.to(dtype), tokens, divergence=TopK(2)).kl
        found.append(torch.autograd.grad(kl.sum(), head)[0])
    assert found[0][3].abs() > 0.1
    assert_close([found[1]], [found[0].float()], 1e-5, 1e-6)


@pytest.mark.parametrize("forbidden_in_ref", [True, False])
def test_topk_of_more_tokens_than_the_policy_allows_is_the_exact_kl(forbidden_in_ref):
    case = make(n=4, vocab=11)
    case.policy_bias[:5] = -torch.inf
    if forbidden_in_ref:
        case.ref_bias[:5] = -torch.inf
    case = case._replace(tokens=case.tokens.clamp(min=5))
    found = []
    for divergence in ("rkl", TopK(6), TopK(7), TopK(11)):
        policy, leaves = case.leaves()
        stats = fused_token_stats(*policy.positional, **policy.bias, divergence=divergence)
        found.append([stats.kl.detach(), *gradients(stats.kl.sum(), leaves)])
    for topk in found[1:]:
        assert_close(topk, found[0], 1e-11, 1e-11)


def test_unknown_divergences_and_settings_are_refused_by_name():
    case = make()
    with pytest.raises(ValueError, match="'kld' is unknown"):
        fused_token_stats(*case.positional, divergence="kld")
    with pytest.raises(ValueError, match="alpha=2"):
        fused_token_stats(*case.positional, divergence=get_divergence("skew_fkl", alpha=2.0))
    with pytest.raises(ValueError, match=r"TopK\(k=0\)"):
        fused_token_stats(*case.positional, divergence=TopK(0))
