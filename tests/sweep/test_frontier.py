"""Fronts, volumes, surfaces and intervals against their definitions and closed forms."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from rlkl.evaluation import OptimalTilt
from rlkl.sweep import hypervolume, pareto_front
from rlkl.sweep.analysis import efficiencies, frontier, over_optimisation
from rlkl.sweep.frontier import Replicas, attainment_surface

few_values = st.integers(0, 6).map(float)  # ties in one coordinate and equal points happen often
point_sets = arrays(float, st.tuples(st.integers(1, 25), st.just(2)), elements=few_values)


def dominates(a, b) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and (a[0] < b[0] or a[1] > b[1])


@given(point_sets)
@settings(max_examples=200)
def test_the_front_is_the_points_that_no_other_dominates(points):
    by_definition = [not any(dominates(b, a) for b in points) for a in points]
    assert pareto_front(points).tolist() == by_definition


@given(point_sets)
@settings(max_examples=100)
def test_the_hypervolume_is_the_count_of_unit_squares_below_the_points(points):
    """On whole numbers: square (i, j) of KL [i, i+1] and reward [j, j+1] is covered if a point has
    KL ≤ i and reward ≥ j + 1.
    """
    squares = sum(
        bool(((points[:, 0] <= i) & (points[:, 1] >= j + 1)).any())
        for i in range(7)
        for j in range(1, 6)
    )
    assert hypervolume(points, (7.0, 1.0)) == squares


@pytest.mark.parametrize("as_given", [list, tuple, np.array, torch.tensor])
def test_points_and_reference_point_come_as_lists_arrays_or_tensors(as_given):
    points = as_given([[2.0, 1.0], [3.0, 2.0], [3.5, 1.0]])
    assert pareto_front(points).tolist() == [True, True, False]
    assert hypervolume(points, as_given([4.0, 0.0])) == 3.0


@pytest.mark.parametrize("point", [(4.0, 0.0, 1.0), (np.nan, 0.0), (4.0, -np.inf), 4.0])
def test_a_reference_point_that_is_none_is_refused(point):
    with pytest.raises(ValueError, match="reference_point is"):
        hypervolume([(2.0, 1.0)], point)


def test_points_beyond_the_reference_point_cover_nothing():
    assert hypervolume(np.array([[5.0, 1.0], [1.0, -2.0]]), (4.0, 0.0)) == 0
    assert hypervolume(np.zeros((0, 2)), (4.0, 0.0)) == 0
    assert pareto_front(np.zeros((0, 2))).tolist() == []


@pytest.mark.parametrize("bad", [[[1.0, np.nan]], [[1.0, np.inf]], [[1.0, 2.0, 3.0]], [1.0, 2.0]])
def test_what_is_no_point_is_refused(bad):
    with pytest.raises(ValueError, match="point"):
        pareto_front(np.array(bad))


@given(
    arrays(float, st.tuples(st.integers(3, 15), st.just(2)), elements=few_values),
    st.integers(2, 3),
    st.sampled_from([1 / 3, 0.5, 1.0]),
)
@settings(max_examples=60)
def test_a_surface_bounds_what_so_many_of_the_sets_attain(points, count, share):
    sets = np.arange(len(points)) % count
    surface = attainment_surface(points, sets, share)
    needed = int(np.ceil(share * count - 1e-9))
    for kl in range(7):
        for reward in range(7):
            attained = sum(
                bool(((p[:, 0] <= kl) & (p[:, 1] >= reward)).any())
                for p in (points[sets == s] for s in range(count))
            )
            below = bool(((surface[:, 0] <= kl) & (surface[:, 1] >= reward)).any())
            assert below == (attained >= needed)


def replicas(rewards: np.ndarray, arms: list[str] | None = None) -> Replicas:
    """Runs of one point each: configuration c, replica s, KL c + 1 and the reward given."""
    configurations, seeds = rewards.shape
    kls = np.repeat(np.arange(1.0, configurations + 1), seeds)
    return Replicas(
        np.stack([kls, rewards.ravel()], 1),
        np.arange(rewards.size),
        np.repeat(np.arange(configurations), seeds),
        arms or ["rb"] * configurations,
        np.arange(rewards.size),
    )


def some_of(made: Replicas, runs: list[int]) -> Replicas:
    """Some runs of those that `replicas` made."""
    numbers = np.arange(len(runs))
    return Replicas(made.points[runs], numbers, made.configurations[runs], made.arms, numbers)


def test_the_interval_of_a_mean_is_students():
    rewards = np.random.default_rng(0).normal(size=(1, 5))
    made = replicas(rewards)
    (estimate,) = made.interval(lambda drawn: made.means(drawn)[:, 1], resamples=20_000)
    half = stats.t.ppf(0.975, 4) * rewards.std(ddof=1) / np.sqrt(5)
    assert estimate.value == pytest.approx(rewards.mean())
    # The bootstrap's own error: the sd of 20,000 draws is known to about 1/√40,000.
    assert estimate.ci95[1] - estimate.value == pytest.approx(half, rel=0.03)


def test_intervals_of_three_seeds_hold_the_truth_as_often_as_they_say():
    """95% of 200 intervals: 190 ± 3.1; the plain bootstrap of three seeds would hold it in 80%."""
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        made = replicas(generator.normal(size=(6, 3)))
        (estimate,) = made.interval(
            lambda drawn, made=made: made.means(drawn)[:, 1].mean(keepdims=True),
            resamples=100,
            seed=trial,
        )
        held += estimate.ci95[0] < 0 < estimate.ci95[1]
    assert 190 - 4 * 3.1 < held <= 200


def test_a_number_that_rests_on_one_of_many_configurations_has_the_freedom_of_its_seeds():
    """Pooled over the 12 configurations, t with 24 in place of 2 degrees of freedom holds the truth
    in 82% of cases: 164 ± 5.4 of 200, where 95% are 190 ± 3.1.
    """
    generator = np.random.default_rng(2)
    held = 0
    for trial in range(200):
        made = replicas(generator.normal(size=(12, 3)))
        (estimate,) = made.interval(
            lambda drawn, made=made: made.means(drawn)[:1, 1], resamples=200, seed=trial
        )
        held += estimate.ci95[0] < 0 < estimate.ci95[1]
    assert 190 - 4 * 3.1 < held <= 200


def test_shares_of_the_variance_of_a_mean_are_the_classical_ones():
    rewards = np.random.default_rng(4).normal(size=(2, 3))
    made = replicas(rewards)
    shares = made.variance_shares(lambda drawn: made.means(drawn)[:, 1])
    classical = rewards.var(axis=1, ddof=1) / 3
    assert shares == pytest.approx(np.diag(classical))


def test_what_is_attained_has_limits_that_some_seeds_attain_and_that_rise_with_the_kl(make_result):
    result = make_result()
    front = frontier(result)
    for estimates in front.attained.values():
        low, high = np.array([e.ci95 for e in estimates]).T
        assert max(high) <= max(p.reward for p in result.points)
        assert (np.diff(low) >= 0).all()
        assert (np.diff(high) >= 0).all()
        assert all(a <= e.value <= b for e, a, b in zip(estimates, low, high, strict=True))


def test_one_seed_has_no_interval():
    made = replicas(np.ones((3, 1)))
    (estimate,) = made.interval(made.share_on_front)
    assert estimate.ci95 is None


def test_shares_of_the_front_count_its_points_and_add_up_to_one():
    made = replicas(np.array([[1.0, 1.5], [2.0, 0.5], [1.2, 3.0]]), ["k1", "rb", "k1"])
    # the front: (1, 1.5) of k1, (2, 2.0) of rb, (3, 3.0) of k1
    share = made.share_on_front(made.original())
    assert dict(zip(made.names, share, strict=True)) == {"k1": 2 / 3, "rb": 1 / 3}


def test_more_seeds_do_not_raise_the_hypervolume():
    one = replicas(np.array([[1.0], [2.0]]))
    three = replicas(np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]))
    at = (4.0, 0.0)
    assert one.hypervolumes(one.original(), at) == three.hypervolumes(three.original(), at)


def test_missing_seeds_do_not_lower_the_hypervolume():
    """Seeds that are worth the same: how many each configuration has changes nothing."""
    three = replicas(np.array([[1.0] * 3, [2.0] * 3, [4.0] * 3]))
    kept = [0, 1, 2, 3, 6, 7]  # three seeds of the first, one of the second, two of the third
    some = some_of(three, kept)
    at = (4.0, 0.0)
    assert some.hypervolumes(some.original(), at) == three.hypervolumes(three.original(), at)
    drawn = some.resamples(20, seed=0)
    assert {float(some.hypervolumes(d, at)[0]) for d in drawn} == {7.0}


def test_the_hypervolume_of_part_of_the_seeds_is_on_average_that_of_all():
    """Over 300 sweeps, to a standard error of 0.03; sets without a configuration lack 0.6."""
    generator, at = np.random.default_rng(3), (4.0, -3.0)
    differences = []
    for _ in range(300):
        whole = replicas(generator.normal(size=(3, 3)))
        part = some_of(whole, [0, 1, 2, 3, 4, 6])
        volumes = [made.hypervolumes(made.original(), at)[0] for made in (part, whole)]
        differences.append(volumes[0] - volumes[1])
    stderr = np.std(differences) / np.sqrt(300)
    assert abs(np.mean(differences)) < 4 * stderr < 0.5


def test_a_number_that_rests_on_a_configuration_of_one_seed_has_no_interval(make_result):
    result = make_result()
    points = [p for p in result.points if p.configuration != 3 or p.seed == 0]
    assert {p.arm for p in result.points if p.configuration == 3} == {"rb"}
    front = frontier(replace(result, points=points), resamples=20)
    assert front.hypervolume["k1"].ci95 is not None
    assert front.hypervolume["rb"].ci95 is None
    assert front.hypervolume_difference["k1", "rb"].ci95 is None
    assert {e.ci95 for e in front.share_on_front.values()} == {None}
    assert front.comparisons[0].mean.ci95 is None
    assert {e.ci95 for e in front.attained["rb"]} == {None}


def test_the_interval_of_an_area_ends_at_nothing_and_that_of_a_difference_does_not(make_result):
    result = make_result(configurations=4, seeds=2)
    low = [replace(p, reward=p.reward - 1.2 * p.seed, judge=None) for p in result.points]
    front = frontier(replace(result, points=low), resamples=20)
    assert {e.ci95[0] for e in front.hypervolume.values()} == {0.0}
    assert front.hypervolume_difference["k1", "rb"].ci95[0] < 0


def test_resampling_keeps_every_configuration_and_its_own_runs():
    made = replicas(np.arange(12.0).reshape(4, 3))
    drawn = made.resamples(200, seed=0)
    assert drawn.shape == (200, 4, 3)
    assert (drawn // 3 == np.arange(4)[:, None]).all(), "runs 3c … 3c + 2 are configuration c's"
    assert len({tuple(d.ravel()) for d in drawn}) > 190


def test_a_configuration_with_a_failed_seed_takes_part_with_the_others(make_result):
    result = make_result()
    result.points[:] = [p for p in result.points if p.run_id != "003-seed1"]
    front = frontier(result, resamples=50)
    assert sum(e.value for e in front.share_on_front.values()) == pytest.approx(1)
    assert np.isfinite([e.value for e in front.attained["rb"]]).all()


def test_the_median_attainment_band_is_the_surface(make_result):
    front = frontier(make_result(), resamples=20)
    for arm, surface in front.surfaces.items():
        assert {at for at, _ in surface} <= set(front.kls), "its steps are where they are"
        for kl, attained in zip(front.kls, front.attained[arm], strict=True):
            within = [reward for at, reward in surface if at <= kl]
            assert attained.value == pytest.approx(max([0.0, *within]))


def test_what_half_of_the_seeds_attain_is_of_the_arms_own_seeds(make_result):
    """One seed of rb and none missing of k1: rb attains what that seed does, and k1 as before."""
    result = make_result(seeds=5)
    points = [p for p in result.points if p.arm == "k1" or p.seed == 0]
    front = frontier(replace(result, points=points), resamples=20)
    alone = [p for p in points if p.arm == "rb"]
    for kl, attained in zip(front.kls, front.attained["rb"], strict=True):
        assert attained.value == max([0.0, *(p.reward for p in alone if p.kl <= kl)])
    whole = frontier(result, resamples=20)
    assert front.attained["k1"][-1].value == whole.attained["k1"][-1].value


def test_a_set_attains_with_every_configuration_though_one_has_fewer_seeds(make_result):
    """Where the seeds are worth the same, one seed of the best configuration is as good as three;
    band and surface agree.
    """
    result = make_result()
    first = {p.configuration: p for p in result.points if p.seed == 0}
    same = [
        replace(p, kl=first[p.configuration].kl, reward=first[p.configuration].reward)
        for p in result.points
    ]
    whole = frontier(replace(result, points=same), resamples=2)
    best = max((p for p in same if p.arm == "rb"), key=lambda p: p.reward).configuration
    part = [p for p in same if p.configuration != best or p.seed == 0]
    front = frontier(replace(result, points=part), resamples=2)
    assert [e.value for e in front.attained["rb"]] == [e.value for e in whole.attained["rb"]]
    assert front.surfaces == whole.surfaces


def test_the_order_of_the_points_changes_nothing(make_result):
    """With checkpoints: the end of a run is the point that says so, not the last one met."""
    result = make_result(checkpoints=3)
    there = frontier(result, resamples=20)
    back = frontier(replace(result, points=result.points[::-1]), resamples=20)
    assert replace(back, on_front=back.on_front[::-1]) == there


def test_at_equal_kl_the_difference_is_that_of_the_interpolated_curves(make_result):
    """rb at KL x has 2 log(1 + x), k1 2 log(1 + x/1.3), up to noise of 0.05."""
    (comparison,) = frontier(make_result(seeds=20), resamples=100).comparisons
    assert (comparison.first, comparison.second) == ("k1", "rb")
    x = np.array(comparison.kls)
    truth = 2 * np.log1p(x / 1.3) - 2 * np.log1p(x)
    found = np.array([e.value for e in comparison.difference])
    # a chord lies below the curve by at most h²/8 · max|2/(1 + x)²| = 0.1 for k1's steps of 1.3
    assert np.abs(found - truth).max() < 0.15
    assert comparison.mean.ci95[1] < 0


def test_equal_arms_differ_by_nothing_and_share_the_front(make_result):
    result = make_result()
    twins = [
        type(p)(**{**vars(p), "arm": arm, "run_id": f"{arm}{p.run_id}", "configuration": c})
        for p in result.points
        if p.arm == "rb"
        for arm, c in (("a", p.configuration), ("b", p.configuration + 100))
    ]
    result.points[:] = twins
    front = frontier(result, resamples=50)
    assert front.share_on_front["a"].value == front.share_on_front["b"].value == 0.5
    assert front.comparisons[0].mean.value == 0
    assert front.hypervolume_difference["a", "b"].value == 0
    assert front.hypervolume_difference["a", "b"].ci95[0] < 0


def test_efficiency_is_the_gain_over_the_optimums_at_the_same_kl(make_result):
    result = make_result()
    point = result.points[1]
    optimum = 3 * np.log1p(point.kl)
    share = efficiencies(result)[1]
    assert share.share == pytest.approx(point.reward / optimum, rel=0.01)
    assert not share.upper_bound
    far = type(point)(**{**vars(point), "kl": 10.0})
    result.points[1] = far
    beyond = efficiencies(result)[1]
    assert beyond.upper_bound
    assert beyond.share == pytest.approx(far.reward / (3 * np.log1p(3.4)), rel=0.02)


def test_on_the_optimum_the_share_is_all_of_it_also_below_its_first_point(make_result):
    """By a chord from the reference it was 3 times that at 0.01 nats, and 30 times at 0.0001."""
    scores = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    scores = scores + 0.1 * scores**2  # a little skewed, as rewards are
    tilt, result = OptimalTilt(scores), make_result(configurations=4)
    curve = [asdict(point) for point in tilt.curve()]
    reference = {"reward": float(scores.mean()), "optimal": curve}
    on_it = [tilt.at(tilt.beta_of(kl)) for kl in (1e-4, 1e-3, 0.01, 0.03, 0.1, 1.0)]
    assert on_it[4].kl < curve[0]["kl"] < on_it[5].kl
    points = [
        replace(p, kl=point.kl, reward=point.reward)
        for p, point in zip(result.points, on_it, strict=False)
    ]
    shares = [e.share for e in efficiencies(replace(result, points=points, reference=reference))]
    # The gain is σ√(2 KL) (1 + √(2 KL) skewness / 6 + …); the skewness of 0.6 makes 5% by 0.1 nats.
    assert shares == pytest.approx([1.0] * 6, abs=0.06)


def test_beyond_the_known_optimum_a_share_of_a_loss_is_a_lower_bound(make_result):
    """The optimum's gain there is at least that at the limit: of 2.0 or of 4.0, a loss of 1 is
    −50% or −25%.
    """
    result = make_result()
    result.points[0] = replace(result.points[0], kl=10.0, reward=-1.0)
    result.points[1] = replace(result.points[1], kl=10.0, reward=1.0)
    result.points[2] = replace(result.points[2], kl=1.0, reward=-1.0)
    lost, gained, within = efficiencies(result)[:3]
    assert lost.share == -gained.share < 0
    assert (lost.lower_bound, lost.upper_bound) == (True, False)
    assert (gained.lower_bound, gained.upper_bound) == (False, True)
    assert (within.lower_bound, within.upper_bound) == (False, False)


def test_over_optimisation_is_found_where_the_judge_turns_and_not_before(make_result):
    """In the made sweep the judge turns down after 2 nats, the reward never does."""
    found = over_optimisation(make_result())
    assert found["rb"] is not None
    assert found["rb"].judge_falls
    assert 1.0 < found["rb"].from_kl < 2.5
    result = make_result()
    agreeing = [type(p)(**{**vars(p), "judge": p.reward}) for p in result.points]
    result.points[:] = agreeing
    assert over_optimisation(result) == {"k1": None, "rb": None}


def test_over_optimisation_is_rarely_announced_where_nothing_changes_and_never_of_one_point(
    make_result,
):
    """Two seeds, reward and judge flat: 1.96 standard errors of two values are passed in 15% and
    more of single comparisons, Welch's t in at most 2.5%; of three later ones about 7%.
    """
    generator, result, announced = np.random.default_rng(0), make_result(8, seeds=2), 0
    for _ in range(100):
        flat = [
            replace(p, reward=float(r), judge=float(j))
            for p, (r, j) in zip(result.points, generator.normal(size=(16, 2)), strict=True)
        ]
        found = over_optimisation(replace(result, points=flat))
        announced += sum(turn is not None for turn in found.values())
    assert announced < 0.07 * 200
    assert over_optimisation(make_result(configurations=2)) == {}
