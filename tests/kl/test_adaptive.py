"""Adaptive KL against its definition written out token by token, and its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlkl.kl import adaptive_kl, forward_kl, head_tail_gaps, reference_head, reverse_kl

INF = torch.inf


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def obvious_head(q: list[float], head_mass: float, rule: str) -> set[int]:
    """The head of one distribution by walking down its tokens."""
    if head_mass == 1:
        return set(range(len(q)))
    order = sorted(range(len(q)), key=lambda v: -q[v])
    head, mass = {order[0]}, q[order[0]]
    for v in order[1:]:
        if rule == "within" and mass + q[v] > head_mass:
            break
        if rule == "reach" and mass >= head_mass:
            break
        head.add(v)
        mass += q[v]
    return head


def obvious_akl(
    policy: Tensor, ref: Tensor, head_mass: float, rule: str, flipped: bool
) -> tuple[float, float, float]:
    """AKL of one position and its two gaps, by loops over the vocabulary."""
    p, q = policy.softmax(-1).tolist(), ref.softmax(-1).tolist()
    head = obvious_head(q, head_mass, rule)
    g_head = sum(abs(p[v] - q[v]) for v in range(len(p)) if v in head)
    g_tail = sum(abs(p[v] - q[v]) for v in range(len(p)) if v not in head)
    w = g_head / (g_head + g_tail)
    w = 1 - w if flipped else w
    value = w * forward_kl(policy, ref) + (1 - w) * reverse_kl(policy, ref)
    return float(value), g_head, g_tail


@pytest.mark.parametrize("flipped", [False, True], ids=["akl", "akl_r"])
@pytest.mark.parametrize("rule", ["within", "reach"])
@pytest.mark.parametrize("head_mass", [0.01, 0.5, 0.9, 1.0])
def test_adaptive_kl_is_its_definition_token_by_token(head_mass, rule, flipped):
    policy, ref = random_logits(6, 4, 9), random_logits(6, 4, 9, seed=1)
    value = adaptive_kl(policy, ref, head_mass=head_mass, head_rule=rule, flipped=flipped)
    gaps = head_tail_gaps(policy, ref, head_mass=head_mass, head_rule=rule)
    assert value.shape == (6, 4)
    for i, j in torch.cartesian_prod(torch.arange(6), torch.arange(4)).tolist():
        expected, head, tail = obvious_akl(policy[i, j], ref[i, j], head_mass, rule, flipped)
        assert value[i, j].item() == pytest.approx(expected, rel=1e-12)
        assert gaps.head[i, j].item() == pytest.approx(head, rel=1e-12)
        assert gaps.tail[i, j].item() == pytest.approx(tail, rel=1e-9, abs=1e-14)


@settings(max_examples=40)
@given(
    masses=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    head_mass=st.integers(1, 20),
    rule=st.sampled_from(["within", "reach"]),
)
def test_the_head_is_that_of_the_walk_down_the_tokens(masses, head_mass, rule):
    q = (torch.tensor(masses, dtype=torch.float64) / sum(masses)).tolist()
    # Off the lattice of possible sums, so that rounding decides nothing.
    threshold = (head_mass - 0.5) / 20.0 + 1e-4 * 2**0.5
    logp = torch.tensor(q, dtype=torch.float64).log()
    found = reference_head(logp, threshold, rule)
    assert set(found.nonzero()[:, 0].tolist()) == obvious_head(q, threshold, rule)


def test_the_two_readings_of_the_head_differ_by_the_token_that_crosses_the_mass():
    q = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert reference_head(q.log(), 0.5, "within").tolist() == [False, True, False, False]
    assert reference_head(q.log(), 0.5, "reach").tolist() == [False, True, True, False]
    p = torch.tensor([0.2, 0.4, 0.2, 0.2])
    assert adaptive_kl(p.log(), q.log()) == reverse_kl(p.log(), q.log())  # no gap in the head
    half = (forward_kl(p.log(), q.log()) + reverse_kl(p.log(), q.log())) / 2
    torch.testing.assert_close(adaptive_kl(p.log(), q.log(), head_rule="reach"), half)


def test_the_most_likely_token_is_head_whatever_its_mass():
    q = torch.tensor([0.05, 0.9, 0.05])
    for rule in ("within", "reach"):
        assert reference_head(q.log(), 0.5, rule).tolist() == [False, True, False]


def test_akl_and_akl_r_are_the_two_kls_together():
    policy, ref = random_logits(5, 9), random_logits(5, 9, seed=1)
    both = adaptive_kl(policy, ref) + adaptive_kl(policy, ref, flipped=True)
    torch.testing.assert_close(both, forward_kl(policy, ref) + reverse_kl(policy, ref))
    assert (adaptive_kl(policy, ref) - adaptive_kl(policy, ref, flipped=True)).abs().min() > 1e-4


@pytest.mark.parametrize("flipped", [False, True], ids=["akl", "akl_r"])
def test_the_weights_are_constants_to_the_gradient(flipped):
    policy, ref = random_logits(3, 7).requires_grad_(), random_logits(3, 7, seed=1)
    w = head_tail_gaps(policy, ref).forward_weight
    assert not w.requires_grad
    w = 1 - w if flipped else w
    held = w * forward_kl(policy, ref) + (1 - w) * reverse_kl(policy, ref)
    (expected,) = torch.autograd.grad(held.sum(), policy)
    (gradient,) = torch.autograd.grad(adaptive_kl(policy, ref, flipped=flipped).sum(), policy)
    torch.testing.assert_close(gradient, expected)


def test_all_of_the_mass_as_head_is_forward_kl_and_its_flip_reverse_kl():
    policy, ref = random_logits(5, 9), random_logits(5, 9, seed=1)
    for rule in ("within", "reach"):
        whole = {"head_mass": 1.0, "head_rule": rule}
        assert adaptive_kl(policy, ref, **whole).eq(forward_kl(policy, ref)).all()
        assert adaptive_kl(policy, ref, **whole, flipped=True).eq(reverse_kl(policy, ref)).all()


def test_equal_distributions_weigh_both_directions_alike():
    logits = random_logits(4, 9)
    gaps = head_tail_gaps(logits, logits)
    assert gaps.forward_weight.eq(0.5).all()
    assert adaptive_kl(logits, logits).eq(0).all()


def test_tokens_of_no_probability_are_tail_and_change_nothing():
    policy, ref = random_logits(3, 6), random_logits(3, 6, seed=1)
    excluded = torch.full((3, 2), -INF)
    padded = (torch.cat([policy, excluded], -1), torch.cat([ref, excluded], -1))
    torch.testing.assert_close(adaptive_kl(*padded), adaptive_kl(policy, ref))
    assert not reference_head(padded[1].log_softmax(-1))[..., 6:].any()


def test_an_infinite_direction_without_weight_does_not_count():
    ref = torch.tensor([0.5, 0.25, 0.25]).log()
    policy = torch.tensor([0.5, 0.5, 0.0]).log()  # all of the gap is in the tail
    assert forward_kl(policy, ref) == INF
    assert adaptive_kl(policy, ref) == reverse_kl(policy, ref)
    assert adaptive_kl(policy, ref, flipped=True) == INF


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head_mass": 0.0}, "head_mass=0.0: must lie in"),
        ({"head_mass": 1.1}, "head_mass=1.1: must lie in"),
        ({"head_rule": "top"}, "head_rule='top': use 'within' or 'reach'"),
    ],
)
def test_an_impossible_head_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        adaptive_kl(random_logits(4), random_logits(4, seed=1), **wrong)
