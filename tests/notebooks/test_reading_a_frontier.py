"""What notebook 03 says in words is what the records say."""

from pathlib import Path

import numpy as np
import pytest

from rlkl.sweep import hypervolume
from rlkl.sweep.export import Analysis, analyse
from rlkl.sweep.records import SweepResult

RECORDS = Path(__file__).parents[2] / "notebooks" / "sweep_kl.jsonl"


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(SweepResult.load(RECORDS))


def curve(analysis, arm):
    """(KL, reward) of an arm's configurations, by rising KL."""
    return np.array([(row["kl"], row["reward"]) for row in analysis.means if row["arm"] == arm])


def test_seeds_lie_closer_together_than_the_error_over_prompts(analysis):
    ends = analysis.result.ends
    labels = {p.label for p in ends}
    seeds = [np.var([p.reward for p in ends if p.label == label], ddof=1) for label in labels]
    assert np.mean(seeds) < np.mean([p.reward_se**2 for p in ends])


def test_half_of_the_front_is_in_the_rewards_intervals_and_part_of_it_is_rbs_unopposed(analysis):
    for share in analysis.reward.share_on_front.values():
        assert share.ci95[0] < 0.5 < share.ci95[1]
    assert abs(analysis.judge.share_on_front["rb"].ci95[0] - 0.5) < 0.02  # at the very edge
    points = analysis.result.points
    least = min(p.kl for p in points if p.arm == "k1")
    ahead = zip(points, analysis.reward.on_front, strict=True)
    assert {p.arm for p, on in ahead if on and p.kl < least} == {"rb"}


def test_hypervolumes_differ_where_little_kl_counts_and_not_over_all(analysis):
    for front in (analysis.reward, analysis.judge):
        low, high = front.hypervolume_difference["k1", "rb"].ci95
        assert low < 0 < high
    floor = analysis.reward.reference_point[1]
    few: dict[str, list[float]] = {"k1": [], "rb": []}
    for arm, volumes in few.items():
        for seed in (0, 1, 2):
            own = [p for p in analysis.result.ends if (p.arm, p.seed) == (arm, seed)]
            points = np.array([(p.kl, p.reward) for p in own])
            volumes.append(hypervolume(points, (2.5, floor)))
            assert hypervolume(points, (7.0, floor)) < 0.2 * analysis.reward.hypervolume[arm].value
    assert min(few["rb"]) > 1.5 * max(few["k1"])


def test_at_equal_kl_the_low_end_differs_by_both_and_the_mean_by_the_reward(analysis):
    (reward,), (judge,) = analysis.reward.comparisons, analysis.judge.comparisons
    assert -0.1 < reward.mean.ci95[0] < reward.mean.ci95[1] < 0
    assert judge.mean.ci95[0] < 0 < judge.mean.ci95[1]
    assert judge.mean.value == pytest.approx(reward.mean.value, abs=0.01)
    for comparison in (reward, judge):
        assert (comparison.first, comparison.second) == ("k1", "rb")
        ahead = np.array([e.ci95[1] < 0 for e in comparison.difference])
        kls = np.array(comparison.kls)
        assert ahead.tolist()[:3] == [True, True, False]
        assert not ahead[(kls > 3) & (kls < 10)].any()
        farther = np.diff(ahead[2:].astype(int)).tolist().count(1)  # places, of neighbours
        assert farther == (2 if comparison is reward else 0)
        assert all(e.ci95[0] < 0 for e in comparison.difference)  # nowhere is k1 ahead
        lowest = comparison.difference[0]
        half_width = lowest.ci95[1] - lowest.value
        assert -lowest.value / half_width == pytest.approx(1.8, abs=0.2)  # nearly twice


def test_k1_stops_where_rb_goes_on(analysis):
    k1, rb = curve(analysis, "k1"), curve(analysis, "rb")
    (least, poor), (before, better) = k1[:2]
    assert least > 0.9 * before
    assert 1 - poor / better == pytest.approx(0.4, abs=0.03)
    assert rb[1, 0] < 2 / 3 * least
    gaps = np.interp(k1[:2, 0], *rb.T) - k1[:2, 1]
    assert gaps[1] / gaps[0] == pytest.approx(0.5, abs=0.1)
    assert (np.diff(np.diff(rb[:, 1]) / np.diff(rb[:, 0])) < 0).all(), "rb's curve bends down"


def test_no_run_is_near_the_optimum_or_above_best_of_n(analysis):
    pairs = list(zip(analysis.result.points, analysis.efficiency, strict=True))
    known = [(p, e.share) for p, e in pairs if not e.upper_bound]
    assert len(known) == len(pairs) / 2
    assert max(share for _, share in known) < 0.5
    assert max(e.share for _, e in pairs if e.upper_bound) > 1
    for kl_coef in {p.kl_coef for p, _ in known}:
        k1, rb = (
            np.mean([share for p, share in known if (p.arm, p.kl_coef) == (arm, kl_coef)])
            for arm in ("k1", "rb")
        )
        assert abs(k1 - rb) < 1 - max(k1, rb)
    best = analysis.result.reference["best_of_n"]
    kls, rewards = [p["kl_bound"] for p in best], [p["reward"] for p in best]
    within = [p for p in analysis.result.points if p.kl <= kls[-1]]
    assert all(p.reward < np.interp(p.kl, kls, rewards) for p in within)


def test_the_judge_rises_with_the_reward(analysis):
    assert set(analysis.over_optimised.values()) == {None}
