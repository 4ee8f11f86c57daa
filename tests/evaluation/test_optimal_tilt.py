"""The optimum and best-of-n from samples of the reference: closed forms, definitions, bounds."""

import itertools
import math

import pytest
import torch

from rlkl.evaluation import OptimalTilt, best_of_n_curve


def exact_tilt(q: torch.Tensor, r: torch.Tensor, beta: float) -> tuple[float, float]:
    """KL and reward of π* ∝ q exp(r/β) by its definition."""
    tilted = q * (r / beta).exp()
    tilted = tilted / tilted.sum()
    return float((tilted * (tilted / q).log()).sum()), float((tilted * r).sum())


def test_samples_of_a_known_distribution_give_its_tilt():
    """When each outcome stands among the samples as often as its probability says, exactly."""
    q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    r = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    samples = r.repeat_interleave((q * 8).long())
    tilt = OptimalTilt(samples.expand(2, -1))
    for beta in (0.3, 1.0, 5.0):
        kl, reward = exact_tilt(q, r, beta)
        assert tilt.at(beta).kl == pytest.approx(kl, abs=1e-12)
        assert tilt.at(beta).reward == pytest.approx(reward, abs=1e-12)


def test_the_kl_is_the_reward_over_beta_minus_the_log_normaliser():
    scores = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).double()
    point = OptimalTilt(scores).at(0.7)
    log_z = (scores / 0.7).logsumexp(1) - math.log(50)
    reward = ((scores / 0.7).softmax(1) * scores).sum(1)
    assert point.kl == pytest.approx(float((reward / 0.7 - log_z).mean()), abs=1e-12)


def test_no_other_reweighting_of_the_samples_has_more_reward_at_the_same_kl():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 12, generator=generator).double()
    tilt = OptimalTilt(scores)
    for _ in range(200):
        w = (2 * torch.randn(4, 12, generator=generator).double()).softmax(1)
        kl = float((w * (w * 12).log()).sum(1).mean())
        reward = float((w * scores).sum(1).mean())
        if kl < math.log(12) - 0.3:
            assert reward <= tilt.at(tilt.beta_of(kl)).reward + 1e-6


def test_it_converges_to_the_gaussians_closed_form_within_what_is_trusted():
    """r ~ N(0, 1): the tilt is N(1/β, 1), KL = 1/(2β²), reward = 1/β = √(2 KL)."""
    scores = torch.randn(400, 512, generator=torch.Generator().manual_seed(2))
    tilt = OptimalTilt(scores)
    for share in (0.05, 0.2, 0.5):
        point = tilt.at(tilt.beta_of(share * tilt.trusted_kl))
        assert point.reward == pytest.approx(math.sqrt(2 * point.kl), rel=0.05)
    far = tilt.at(tilt.beta_of(0.95 * math.log(512)))
    assert not far.trusted
    assert far.reward < 0.99 * math.sqrt(2 * far.kl), "beyond, the samples bend it down"


def test_reward_and_kl_rise_along_the_curve_and_start_at_the_reference():
    scores = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    curve = OptimalTilt(scores, {"judge": scores + 1}).curve()
    assert all(a.kl < b.kl and a.reward < b.reward for a, b in itertools.pairwise(curve))
    assert [p.trusted for p in curve] == sorted((p.trusted for p in curve), reverse=True)
    assert {p.trusted for p in curve} == {True, False}
    assert curve[5].others["judge"][0] == pytest.approx(curve[5].reward + 1)
    flat = OptimalTilt(scores).at(1e6)
    assert flat.kl == pytest.approx(0, abs=1e-9)
    assert flat.reward == pytest.approx(float(scores.mean()), abs=1e-5)


def test_equal_scores_cannot_be_tilted():
    point = OptimalTilt(torch.ones(3, 8)).at(1.0)
    assert point.kl == 0.0
    assert point.reward == pytest.approx(1.0)
    with pytest.raises(ValueError, match="beta"):
        OptimalTilt(torch.ones(3, 8)).at(0.0)
    with pytest.raises(ValueError, match="samples >= 2"):
        OptimalTilt(torch.ones(3, 1))


def test_the_drop_with_half_the_samples_is_of_the_size_of_the_bias():
    """Gaussian rewards: the truth is √(2 KL); a comparison of the halves with one another, which
    share their bias, would say next to nothing of it.
    """
    half = torch.randn(20, 64, generator=torch.Generator().manual_seed(4))
    again = OptimalTilt(torch.cat([half, half], 1)).half_sample_drop()
    assert again == pytest.approx(0, abs=1e-9), "the same samples twice say nothing more"
    tilt = OptimalTilt(torch.randn(1000, 64, generator=torch.Generator().manual_seed(5)))
    at = [tilt.trusted_kl * (i + 1) / 8 for i in range(8)]
    bias = max(math.sqrt(2 * kl) - tilt.at(tilt.beta_of(kl)).reward for kl in at)
    assert 0.5 * bias < tilt.half_sample_drop() < 2 * bias
    assert OptimalTilt(half[:, :16]).half_sample_drop() is None


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets_of_n_samples(n):
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(5)).double()
    judge = torch.randn(3, 5, generator=torch.Generator().manual_seed(6)).double()
    subsets = list(itertools.combinations(range(5), n))
    best = [max(s, key=lambda i, row=row: row[i]) for row in scores for s in subsets]
    rows = [i for i in range(3) for _ in subsets]
    (point,) = best_of_n_curve(scores, {"judge": judge}, [n])
    assert point.reward == pytest.approx(float(scores[rows, best].mean()))
    assert point.others["judge"][0] == pytest.approx(float(judge[rows, best].mean()))


def test_the_tilt_is_never_below_best_of_n_at_its_kl():
    """Best-of-n's KL is at most its bound, so the optimum there has more reward."""
    scores = torch.rand(50, 256, generator=torch.Generator().manual_seed(7))
    tilt = OptimalTilt(scores)
    for point in best_of_n_curve(scores, ns=[2, 4, 8]):
        assert tilt.at(tilt.beta_of(point.kl_bound)).reward > point.reward - 1e-3


def test_an_n_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="with 4 samples"):
        best_of_n_curve(torch.zeros(2, 4), ns=[5])
