"""The Triton kernels, interpreted on the CPU, give what torch's passes give.

Triton chooses its interpreter when it is first imported, from TRITON_INTERPRET: test_triton_rows.py
runs this file in a process of its own.
"""

import pytest
import torch

from rlkl.kl import OutputHead, fused_token_logp, fused_token_stats
from rlkl.kl.fused import problem, torch_rows, triton_rows
from tests.kl.fused.cases import Case, assert_close, combine, gradients, make, shifted, weights


@pytest.fixture
def use(monkeypatch):
    """A switch between Triton's passes and torch's."""
    monkeypatch.setattr(triton_rows, "_BLOCK", 32)  # smaller than the vocabularies here

    def switch(on: bool) -> None:
        monkeypatch.setattr(problem, "row_passes", lambda *_: triton_rows if on else torch_rows)

    return switch


def results(case: Case, softcap: float | None = None, **options):
    policy, leaves = case.leaves()
    head = OutputHead(policy.policy_head, policy.policy_bias, softcap=softcap)
    stats = fused_token_stats(
        policy.policy_hidden,
        head,
        case.ref_hidden,
        OutputHead(case.ref_head, case.ref_bias),
        case.tokens,
        chunk_size=2,
        **options,
    )
    w = weights(len(case.tokens)).to(stats.kl.dtype)
    found = torch.autograd.grad(combine(stats, *w), leaves)
    alone = fused_token_logp(policy.policy_hidden, head, case.tokens)
    return [x.detach() for x in (*stats, *found, *alone)]


@pytest.mark.parametrize(
    ("dtype", "softcap", "divergence"),
    [
        (torch.float32, None, "rkl"),
        (torch.float64, 3.0, "js"),
    ],
)
def test_statistics_and_gradients_are_those_of_torch(use, dtype, softcap, divergence):
    case = make(n=2, vocab=61).to(dtype)
    use(False)
    expected = results(case, softcap, divergence=divergence)
    use(True)
    got = results(case, softcap, divergence=divergence)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert_close(got, expected, tolerance, tolerance)


@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (2, 33)])
def test_any_shape_gives_what_torch_gives(use, n, vocab):
    case = make(n=n, vocab=vocab)
    use(False)
    expected = results(case)
    use(True)
    assert_close(results(case), expected, 1e-11, 1e-11)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 · inf of forbidden tokens, in numpy
def test_small_far_and_forbidden_are_what_torch_makes_of_them(use):
    small = shifted(make(n=2, vocab=61), 1e-4).to(torch.float32)
    far = make(n=2, vocab=61)
    far = far._replace(policy_hidden=far.policy_hidden * 40, ref_hidden=far.ref_hidden * 40)
    forbidden = make(n=2, vocab=61)
    forbidden.policy_bias[:40] = forbidden.ref_bias[:20] = -torch.inf
    forbidden = forbidden._replace(tokens=forbidden.tokens.clamp(min=40))
    for case in (small, far, forbidden):
        use(False)
        expected = fused_token_stats(*case.positional, **case.bias)
        use(True)
        assert_close(fused_token_stats(*case.positional, **case.bias), expected, 1e-3, 1e-9)


def test_nearly_certain_tokens_keep_the_digits_of_their_gradients(use):
    use(True)
    head = torch.tensor([[0.0], [-14.0]], dtype=torch.float32, requires_grad=True)
    ref = torch.tensor([[6.1], [-6.3]], dtype=torch.float32)
    hidden, tokens = torch.ones(1, 1, dtype=torch.float32), torch.tensor([0])
    (gradient,) = gradients(fused_token_stats(hidden, head, hidden, ref, tokens).kl.sum(), [head])
    truth = head.detach().double().requires_grad_()
    exact = fused_token_stats(hidden.double(), truth, hidden.double(), ref.double(), tokens).kl
    assert_close([gradient], [x.float() for x in gradients(exact.sum(), [truth])], 1e-4, 0)


def test_identical_models_have_exactly_no_kl(use):
    use(True)
    case = make(n=2, vocab=61).to(torch.float32)
    case = case._replace(
        ref_hidden=case.policy_hidden, ref_head=case.policy_head, ref_bias=case.policy_bias
    )
    policy, leaves = case.leaves()
    kl = fused_token_stats(*policy.positional, **policy.bias).kl
    assert (kl == 0).all()
    assert all((x == 0).all() for x in gradients(kl.sum(), leaves))
