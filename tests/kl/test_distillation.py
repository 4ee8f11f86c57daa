"""The registry of divergences: each claim, true and false, shown on distributions that tell."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from rlkl.kl import DIVERGENCES, get_divergence

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)

INF = torch.inf


def random_pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = 2 * torch.randn(2, 50, 8, generator=generator)
    return a, b


@every_divergence
def test_the_claim_of_symmetry_holds_or_fails_as_made(divergence):
    student, teacher = random_pair()
    difference = divergence(student, teacher) - divergence(teacher, student)
    if divergence.claims.symmetric:
        torch.testing.assert_close(difference, torch.zeros_like(difference))
    else:
        assert difference.abs().max() > 1e-2


@every_divergence
def test_the_claimed_direction_is_the_one_that_costs_more(divergence):
    missing = torch.tensor([0.7 - 1e-6, 0.3, 1e-6]).log()
    whole = torch.tensor([0.4, 0.3, 0.3]).log()
    student_misses, student_adds = divergence(missing, whole), divergence(whole, missing)
    if divergence.claims.direction == "forward":
        assert student_misses > 1.2 * student_adds
    elif divergence.claims.direction == "reverse":
        assert student_adds > 1.2 * student_misses
    elif divergence.claims.symmetric:
        torch.testing.assert_close(student_misses, student_adds)


def test_a_symmetric_divergence_claims_no_direction():
    for divergence in DIVERGENCES.values():
        if divergence.claims.symmetric:
            assert divergence.claims.direction == "neither"


@every_divergence
def test_the_claims_of_finiteness_hold_or_fail_as_made(divergence):
    everything, part = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.6, 0.4, 0.0]).log()
    claims = divergence.claims
    assert divergence(part, everything).isfinite() == claims.finite_if_student_excludes
    assert divergence(everything, part).isfinite() == claims.finite_if_teacher_excludes


@every_divergence
def test_the_teacher_is_the_only_optimum_and_costs_nothing(divergence):
    student, teacher = random_pair()
    assert (divergence(student, teacher) > 0).all()
    assert divergence(teacher, teacher).eq(0).all()


@every_divergence
def test_plain_descent_on_it_reaches_the_teacher(divergence):
    _, teacher = random_pair()
    teacher = teacher[:3] / 2
    student = torch.zeros_like(teacher, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        divergence(student, teacher).sum().backward()
        optimizer.step()
    torch.testing.assert_close(student.softmax(-1), teacher.softmax(-1), rtol=0, atol=2e-3)


@every_divergence
def test_the_gradient_of_the_temperature_squared_loss_keeps_its_size(divergence):
    """T² D(logits / T) has a finite gradient that is not zero as T grows: Hinton's argument."""
    student, teacher = random_pair()
    student, teacher = (student / 10).requires_grad_(), teacher / 10

    def gradient(temperature: float) -> Tensor:
        loss = temperature**2 * divergence(student, teacher, temperature=temperature).sum()
        return torch.autograd.grad(loss, student)[0]

    torch.testing.assert_close(gradient(100.0), gradient(1000.0), rtol=2e-2, atol=1e-4)
    assert gradient(1000.0).abs().max() > 1e-3


def test_settings_reach_the_formula_and_others_are_refused():
    student, teacher = random_pair()
    skewed = get_divergence("skew_fkl", alpha=0.5)
    assert (skewed(student, teacher) < DIVERGENCES["skew_fkl"](student, teacher)).all()
    assert get_divergence("akl", head_rule="reach").settings == {"head_rule": "reach"}
    with pytest.raises(ValueError, match="fkl has no setting 'alpha'; it takes: none"):
        get_divergence("fkl", alpha=0.5)
    with pytest.raises(ValueError, match="akl_r has no setting 'flipped'; it takes: head_mass"):
        get_divergence("akl_r", flipped=False)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="divergence 'kl' is unknown; use one of fkl, rkl"):
        get_divergence("kl")


@every_divergence
def test_divergences_go_to_other_processes(divergence):
    for there in (pickle.loads(pickle.dumps(divergence)), copy.deepcopy(divergence)):
        assert (there.name, there.settings) == (divergence.name, divergence.settings)
        assert torch.equal(there(*random_pair()), divergence(*random_pair()))
        with pytest.raises(TypeError, match="does not support item assignment"):
            there.settings["weight"] = 0.5
