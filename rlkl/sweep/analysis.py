"""What a sweep's records say: front, shares, volumes, comparisons, efficiency, the judge."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from rlkl.sweep.frontier import (
    Estimate,
    Replicas,
    attainment_surface,
    pareto_front,
    satterthwaite,
)
from rlkl.sweep.records import Point, SweepResult

Measure = Literal["reward", "judge"]
GRID = 25
"""KLs at which curves are compared."""
LEVELS = 200
"""KLs, at most, at which it is said what is attained."""


@dataclass(frozen=True)
class Comparison:
    """Two arms at equal KL: reward of the first minus reward of the second."""

    first: str
    second: str
    kls: list[float]
    difference: list[Estimate]
    mean: Estimate
    """Mean over the common range of KLs."""


@dataclass(frozen=True)
class Frontier:
    """The frontier of a sweep by one measure: the reward, or the judge's score."""

    measure: Measure
    on_front: list[bool]
    """By point."""
    reference_point: tuple[float, float]
    share_on_front: dict[str, Estimate]
    hypervolume: dict[str, Estimate]
    """Of the arms that have a run of every configuration: fewer cover less."""
    hypervolume_difference: dict[tuple[str, str], Estimate]
    surfaces: dict[str, list[tuple[float, float]]]
    """Median attainment surface of each arm: corners, by rising KL."""
    attained: dict[str, list[Estimate]]
    """The same at `kls`, with the middle 95% of the resamples."""
    kls: list[float]
    """0 and the KLs of the points, where what is attained changes (`LEVELS` of them)."""
    comparisons: list[Comparison]


def frontier(result: SweepResult, measure: Measure = "reward", resamples: int = 500) -> Frontier:
    """Everything about the front of one measure, with bootstrap intervals over seeds.

    The reference point is (the largest KL measured, the reference's own mean score); without a
    measured reference, the lowest score.
    """
    points = result.points
    values = np.array([[p.kl, _value(p, measure)] for p in points])
    replicas = _replicas(points, values)
    floor = float((result.reference or {}).get(measure, values[:, 1].min()))
    reference_point = (float(values[:, 0].max()), floor)
    kls = np.unique(np.append(0.0, values[:, 0]))
    kls = kls[np.linspace(0, len(kls) - 1, min(len(kls), LEVELS)).round().astype(int)]
    arms = replicas.names
    original = replicas.original()

    shares = replicas.interval(replicas.share_on_front, resamples=resamples, bounds=(0.0, 1.0))
    pairs = list(itertools.combinations(arms, 2))
    first = [arms.index(a) for a, _ in pairs]
    second = [arms.index(b) for _, b in pairs]

    def volumes(drawn: np.ndarray) -> np.ndarray:
        each = replicas.hypervolumes(drawn, reference_point)
        return np.concatenate([each, each[first] - each[second]])

    least = np.repeat([0.0, -np.inf], [len(arms), len(pairs)])  # an area; a difference
    rests_on = [*([arm] for arm in arms), *pairs]
    covered = replicas.interval(volumes, rests_on, resamples, bounds=(least, np.inf))
    whole = set(arms) - {cell.arm for cell in result.missing if not cell.measured}
    within = replicas.best_within(kls)
    surfaces = {}
    for arm in arms:
        index = [replicas.points_of(runs) for runs in replicas.whole_sets(original, arm).T]
        sets = np.repeat(np.arange(len(index)), [len(i) for i in index])
        corners = attainment_surface(values[np.concatenate(index)], sets, 0.5)
        surfaces[arm] = [(float(kl), float(score)) for kl, score in corners]
    return Frontier(
        measure=measure,
        on_front=pareto_front(values).tolist(),
        reference_point=reference_point,
        share_on_front=dict(zip(arms, shares, strict=True)),
        hypervolume={arm: e for arm, e in zip(arms, covered, strict=False) if arm in whole},
        hypervolume_difference={
            pair: e
            for pair, e in zip(pairs, covered[len(arms) :], strict=True)
            if whole.issuperset(pair)
        },
        surfaces=surfaces,
        attained={
            arm: replicas.percentiles(
                lambda drawn, arm=arm: replicas.attained(drawn, arm, within, floor),
                [arm],
                resamples,
            )
            for arm in arms
        },
        kls=kls.tolist(),
        comparisons=[c for pair in pairs if (c := _compare(replicas, *pair, resamples))],
    )


def _value(point: Point, measure: Measure) -> float:
    value = point.reward if measure == "reward" else point.judge
    assert value is not None  # callers ask for the judge only where there is one
    return value


def _replicas(points: Sequence[Point], values: np.ndarray) -> Replicas:
    ends = [i for i, p in enumerate(points) if p.last]
    ends.sort(key=lambda i: (points[i].configuration, points[i].seed))  # whatever their order
    runs = {points[end].run_id: number for number, end in enumerate(ends)}
    numbers = sorted({p.configuration for p in points})
    arm_of = {p.configuration: p.arm for p in points}
    return Replicas(
        values,
        np.array([runs[p.run_id] for p in points]),
        np.array([numbers.index(points[end].configuration) for end in ends]),
        [arm_of[number] for number in numbers],
        np.array(ends),
    )


def _compare(replicas: Replicas, first: str, second: str, resamples: int) -> Comparison | None:
    span = replicas.common_range(first, second)
    if span is None:
        return None
    kls = np.linspace(*span, GRID)

    def difference(drawn: np.ndarray) -> np.ndarray:
        at = replicas.reward_at(drawn, first, kls) - replicas.reward_at(drawn, second, kls)
        return np.append(at, np.trapezoid(at, kls) / (span[1] - span[0]))

    estimates = replicas.interval(difference, [(first, second)] * (GRID + 1), resamples)
    return Comparison(first, second, kls.tolist(), estimates[:-1], estimates[-1])


@dataclass(frozen=True)
class Efficiency:
    """Reward gain of a point as a share of the optimum's gain at the same KL."""

    share: float
    stderr: float
    upper_bound: bool
    """Whether its KL is beyond what the samples of the reference carry: the optimum's gain there is
    at least that at their limit, and the share at most this."""
    lower_bound: bool
    """Whether it is beyond with less reward than the reference: the share is between this and 0."""

    @property
    def known(self) -> bool:
        """Whether its 95% interval is narrower than from nothing to all of the optimum's gain.

        At little KL the optimum gains little, and the error of a reward may be many times that.
        """
        return 2 * 1.96 * self.stderr < 1.0


def efficiencies(result: SweepResult) -> list[Efficiency | None]:
    """By point; None without a measured reference, or where the optimum gains nothing.

    (reward − reward_ref) / (reward*(KL) − reward_ref), reward* linear between the tilt's points,
    and from (0, reward_ref) to the first of them as √KL: a small tilt has KL ≈ Var(r) / 2β² and
    gains Var(r) / β. (A chord would have several times too little there.) The error is that of the
    point's reward and KL; the reference's is common to all and much smaller.
    """
    trusted = [p for p in result.curve("optimal") if p["trusted"] and p["kl"] > 0]
    if result.reference is None or not trusted:
        return [None] * len(result.points)
    start = result.reference["reward"]
    kls = np.array([point["kl"] for point in trusted])
    gains = np.array([point["reward"] - start for point in trusted])

    def optimum(kl: float) -> float:
        return float(np.interp(kl, kls, gains) * min(1.0, max(0.0, kl / kls[0])) ** 0.5)

    found: list[Efficiency | None] = []
    for point in result.points:
        best = optimum(point.kl)
        if best <= 0:
            found.append(None)
            continue
        beyond = bool(point.kl > kls[-1])
        step = min(0.01 * kls[-1], point.kl / 2)
        ahead, behind = optimum(point.kl + step), optimum(point.kl - step)
        slope = 0.0 if beyond else (ahead - behind) / (2 * step)
        share = float((point.reward - start) / best)
        error = float(np.hypot(point.reward_se, share * slope * point.kl_se)) / best
        found.append(Efficiency(share, error, beyond and share >= 0, beyond and share < 0))
    return found


@dataclass(frozen=True)
class OverOptimisation:
    """An arm whose reward rises on while the judge's score does not (Gao et al., 2022)."""

    arm: str
    from_kl: float
    to_kl: float
    reward_rise: float
    judge_change: float
    judge_falls: bool
    """Whether the judge's change is below 0 by Welch's t-test too, not just no rise."""


_Mean = tuple[float, float, float]
"""A mean with its standard error and the degrees of freedom of that."""


def over_optimisation(result: SweepResult) -> dict[str, OverOptimisation | None]:
    """For each arm, from which KL on its reward rises while the judge does not; None: not seen.

    Between the means of the configurations, by rising KL: the judge's best configuration j and a
    later one k whose reward is higher by Welch's t-test (one-sided, 2.5%) while judge_k ≤ judge_j.
    No other pairs are tested. The standard error of a mean over seeds is that of its spread, with
    n − 1 degrees of freedom; of a single seed the evaluation's, taken as known. An arm of one
    configuration is left out: there is nothing to compare.
    Scaling laws for reward model overoptimization (Gao, Schulman and Hilton, 2022),
    https://arxiv.org/abs/2210.10760.
    """
    found: dict[str, OverOptimisation | None] = {}
    for arm in result.arms:
        runs = [p for p in result.ends if p.arm == arm and p.judge is not None]
        means = sorted(
            (
                _mean_of([p for p in runs if p.configuration == c])
                for c in {p.configuration for p in runs}
            ),
            key=lambda m: m["kl"][0],
        )
        if len(means) > 1:
            found[arm] = _first_turn(arm, means)
    return found


def _first_turn(arm: str, means: list[dict[str, _Mean]]) -> OverOptimisation | None:
    top = max(range(len(means)), key=lambda i: means[i]["judge"][0])
    best = means[top]
    for later in means[top + 1 :]:
        rise = later["reward"][0] - best["reward"][0]
        change = later["judge"][0] - best["judge"][0]
        if rise > _half_interval(later["reward"], best["reward"]):
            falls = change < -_half_interval(later["judge"], best["judge"])
            return OverOptimisation(arm, best["kl"][0], later["kl"][0], rise, change, falls)
    return None


def _half_interval(first: _Mean, second: _Mean) -> float:
    """Half of the 95% interval of the difference of two means (Welch)."""
    variances = np.array([first[1], second[1]]) ** 2
    if variances.sum() == 0:
        return 0.0
    freedom = satterthwaite(variances, np.array([first[2], second[2]]))
    return float(stats.t.ppf(0.975, freedom) * variances.sum() ** 0.5)


def _mean_of(runs: Sequence[Point]) -> dict[str, _Mean]:
    """Over the seeds of one configuration."""
    means = {}
    for name in ("kl", "reward", "judge"):
        values = np.array([getattr(run, name) for run in runs])
        error = float(getattr(runs[0], f"{name}_se"))
        if len(runs) > 1:
            error = float(values.std(ddof=1) / np.sqrt(len(runs)))
        means[name] = (float(values.mean()), error, len(runs) - 1.0 or np.inf)
    return means


def configuration_means(result: SweepResult) -> list[dict[str, Any]]:
    """One row a configuration: means over its seeds with standard errors, by arm and KL."""
    rows = []
    for number in sorted({p.configuration for p in result.points}):
        runs = [p for p in result.ends if p.configuration == number]
        row: dict[str, Any] = {
            "configuration": number,
            "arm": runs[0].arm,
            "kl_coef": runs[0].kl_coef,
            "label": runs[0].label,
        }
        row["seeds"] = len(runs)
        for name in ("kl", "reward", "judge"):
            values = [getattr(run, name) for run in runs]
            if None in values:
                continue
            row[name] = float(np.mean(values))
            spread = float(np.std(values, ddof=1) / np.sqrt(len(runs))) if len(runs) > 1 else None
            row[f"{name}_se"] = spread if spread is not None else getattr(runs[0], f"{name}_se")
        rows.append(row)
    return sorted(rows, key=lambda row: (result.arms.index(row["arm"]), row["kl"]))
