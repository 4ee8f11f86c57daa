"""Reward-vs-KL frontiers: which points are on the front, how much they cover, and how sure that is.

A point is (KL, reward): less of the first and more of the second is better. All intervals come from
one resampling, `Replicas.resamples`: each configuration's seeds are drawn again with replacement, a
run with all its points, and the statistic is computed anew. How little a few seeds say of their own
spread is in Student's t, with the degrees of freedom of the configurations that a number rests on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy import stats

_DIRECTIONS = [False, True]  # the KL is minimised, the reward maximised


def pareto_front(points: Float[np.ndarray, "N 2"]) -> Bool[np.ndarray, " N"]:
    """Which points no other dominates: none has as little KL and as much reward, and one of the two
    better.

    Equal points are on the front together.

    Args:
        points: (KL, reward) of each.

    Raises:
        ValueError: not [N, 2], or not finite.

    Example:
        >>> pareto_front(np.array([[1.0, 1.0], [2.0, 3.0], [2.5, 2.0]])).tolist()
        [True, True, False]
    """
    points = _checked(points)
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(points, maximise=_DIRECTIONS, keep_weakly=True))


def hypervolume(points: Float[np.ndarray, "N 2"], reference_point: tuple[float, float]) -> float:
    """Area, in reward units times nats, that the points dominate up to a reference point.

        area of the union over i of [KL_i, KL_ref] × [reward_ref, reward_i]

    A point beyond the reference point (more KL, or less reward) covers nothing. Values compare only
    at the same reference point.

    Args:
        points: (KL, reward) of each.
        reference_point: (KL_ref, reward_ref); KL_ref an upper bound, reward_ref a lower one.

    Raises:
        ValueError: not [N, 2], or not finite, the reference point included.

    Example: a step of 1 × 2 and one of 2 × 1 above (4, 0).
        >>> hypervolume(np.array([[2.0, 1.0], [3.0, 2.0]]), (4.0, 0.0))
        3.0
    """
    points, reference = _checked(points), np.asarray(reference_point, dtype=float)
    if reference.shape != (2,) or not np.isfinite(reference).all():
        raise ValueError(f"reference_point is {reference_point}; (KL, reward) is needed, finite")
    within = points[(points[:, 0] <= reference[0]) & (points[:, 1] >= reference[1])]
    if len(within) == 0:
        return 0.0
    return float(moocore.hypervolume(within, ref=reference, maximise=_DIRECTIONS))


def _checked(points: Any) -> np.ndarray:
    points = np.asarray(points, dtype=float)
    if points.size == 0:
        points = points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points have shape {points.shape}; rows of (KL, reward) are needed")
    if not np.isfinite(points).all():
        raise ValueError(f"point {int((~np.isfinite(points)).any(1).argmax())} is not finite")
    return points


def attainment_surface(
    points: Float[np.ndarray, "N 2"], sets: Int[np.ndarray, " N"], share: float
) -> Float[np.ndarray, "M 2"]:
    """Corners of the boundary of what at least `share` of the sets attain, by rising KL.

    A set attains (KL, reward) if one of its points has no more KL and no less reward. Computed by
    moocore's empirical attainment function (Grunert da Fonseca, Fonseca and Hall, 2001).

    Example: of two seeds, what both attain.
        >>> points = np.array([[1.0, 1.0], [2.0, 3.0], [1.5, 2.0]])
        >>> attainment_surface(points, np.array([0, 0, 1]), 1.0).tolist()
        [[1.5, 1.0], [2.0, 2.0]]
    """
    order = np.argsort(sets, kind="stable")  # moocore takes a change of set for a new set
    mirrored = _checked(points)[order] * np.array([1.0, -1.0])
    numbers = np.unique(sets[order], return_inverse=True)[1]
    surface = moocore.eaf(mirrored, sets=numbers, percentiles=[100 * share])
    corners = surface[:, :2] * np.array([1.0, -1.0])
    return corners[np.lexsort((corners[:, 1], corners[:, 0]))]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over seeds; no interval where nothing was replicated."""

    value: float
    ci95: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"value": self.value, "ci95": None if self.ci95 is None else list(self.ci95)}


def satterthwaite(
    variances: Float[np.ndarray, "C ..."], freedom: Num[np.ndarray, "C ..."]
) -> Float[np.ndarray, "..."]:
    """Degrees of freedom of a sum of independent variance estimates: (Σ_c v_c)² / Σ_c (v_c²/ν_c).

    An approximate distribution of estimates of variance components (Satterthwaite, 1946). Not all
    variances of a sum may be 0.

    Example: two equal shares add their degrees of freedom, a share of 0 adds none.
        >>> satterthwaite(np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([[2], [2]])).tolist()
        [4.0, 2.0]
    """
    with np.errstate(divide="ignore"):  # where all ν are infinite, so is the result
        return variances.sum(0) ** 2 / (variances**2 / freedom).sum(0)


def _estimates(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[Estimate]:
    limits = zip(low.tolist(), high.tolist(), strict=True)
    return [Estimate(float(v), (a, b)) for v, (a, b) in zip(value, limits, strict=True)]


class Replicas:
    """The runs of a sweep, grouped as replicas of configurations.

    Args:
        points: [N, 2] (KL, reward).
        runs: [N] which run a point belongs to, 0 … R−1.
        configurations: [R] which configuration a run is a replica of, 0 … C−1.
        arms: [C] which arm a configuration belongs to.
        ends: [R] the point that a run ends with, 0 … N−1.
    """

    def __init__(
        self,
        points: Float[np.ndarray, "N 2"],
        runs: Int[np.ndarray, " N"],
        configurations: Int[np.ndarray, " R"],
        arms: Sequence[str],
        ends: Int[np.ndarray, " R"],
    ) -> None:
        self.points, self.runs, self.configurations = _checked(points), runs, configurations
        self.ends = ends
        self.arms = list(arms)
        self.names = list(dict.fromkeys(self.arms))
        self.replicas = [np.flatnonzero(configurations == c) for c in range(len(self.arms))]
        self.sets = max(len(runs) for runs in self.replicas)
        """S: replicas of the configuration that has most."""
        order = np.argsort(runs, kind="stable")
        limits = np.searchsorted(runs[order], np.arange(len(configurations) + 1))
        self._points_of = [order[limits[r] : limits[r + 1]] for r in range(len(configurations))]

    # ---- resampling ------------------------------------------------------------------------------

    def original(self) -> Int[np.ndarray, "C S"]:
        """The runs as they are: row c holds the replicas of configuration c, −1 where it has fewer.

        Column s is one *set*: one replica of every configuration.
        """
        rows = np.full((len(self.arms), self.sets), -1)
        for row, runs in zip(rows, self.replicas, strict=True):
            row[: len(runs)] = runs
        return rows

    def resamples(self, count: int, seed: int) -> Int[np.ndarray, "B C S"]:
        """Each configuration's replicas, drawn again with replacement, `count` times."""
        rows, sizes = self.original(), np.array([len(runs) for runs in self.replicas])[:, None]
        uniform = np.random.default_rng(seed).random((count, *rows.shape))
        chosen = np.take_along_axis(rows[None], (uniform * sizes).astype(int), axis=2)
        return np.where(rows >= 0, chosen, -1)

    def interval(
        self,
        statistic: Callable[[Int[np.ndarray, "C S"]], Float[np.ndarray, " K"]],
        rests_on: Sequence[Sequence[str]] | None = None,
        resamples: int = 500,
        bounds: tuple[float | Float[np.ndarray, " K"], float] = (-np.inf, np.inf),
        seed: int = 0,
    ) -> list[Estimate]:
        """K numbers of the drawn runs, each with a 95% interval over seeds.

            value ± t · √(Σ_c v_c / Σ_c v_c (n_c − 1)/n_c) · sd of the statistic over the resamples

        v_c is the variance that the n_c replicas of configuration c give the statistic
        (`variance_shares`). A bootstrap of n values has a variance too small by (n − 1)/n: the root
        mends it. t is Student's with the degrees of freedom of Σ_c v_c (`satterthwaite`), n_c − 1
        for each c: a number that rests on one configuration has its n_c − 1, a mean over many
        nearly those of all. Cut at `bounds`. `rests_on` names the arms of each number (all arms);
        where one of their configurations has but one replica, whose spread nobody knows, the number
        has no interval.
        """
        value = np.asarray(statistic(self.original()), dtype=float)
        known = [self._replicated(arms) for arms in rests_on or [self.names] * len(value)]
        if not any(known):
            return [Estimate(float(v), None) for v in value]
        draws = np.array([statistic(drawn) for drawn in self.resamples(resamples, seed)])
        counts = np.array([len(runs) for runs in self.replicas])[:, None]
        shares, several = self.variance_shares(statistic), counts > 1
        counts, shares = counts[several[:, 0]], shares[several[:, 0]]
        # Where no single replica moves the statistic, it is taken to rest on the fewest.
        shares = np.where(shares.sum(0) > 0, shares, counts == counts.min())
        widened = np.sqrt(shares.sum(0) / (shares * (counts - 1) / counts).sum(0))
        half = stats.t.ppf(0.975, satterthwaite(shares, counts - 1)) * widened * draws.std(axis=0)
        low, high = np.maximum(value - half, bounds[0]), np.minimum(value + half, bounds[1])
        found = _estimates(value, low, high)
        return [e if k else Estimate(e.value, None) for e, k in zip(found, known, strict=True)]

    def percentiles(
        self,
        statistic: Callable[[Int[np.ndarray, "C S"]], Float[np.ndarray, " K"]],
        arms: Sequence[str],
        resamples: int = 500,
        seed: int = 0,
    ) -> list[Estimate]:
        """K numbers of the drawn runs, each with the limits of the middle 95% of its resamples.

        For statistics that jump from one run to another, whose spread says nothing of their range:
        the limits are values that some seeds have given, and rise with the statistic. Of few seeds
        they hold the truth less often than in 95% of cases. None where a configuration of `arms`
        has but one replica.
        """
        value = np.asarray(statistic(self.original()), dtype=float)
        if not self._replicated(arms):
            return [Estimate(float(v), None) for v in value]
        draws = np.array([statistic(drawn) for drawn in self.resamples(resamples, seed)])
        low, high = np.quantile(draws, [0.025, 0.975], axis=0, method="nearest")
        return _estimates(value, np.minimum(low, value), np.maximum(high, value))

    def variance_shares(
        self, statistic: Callable[[Int[np.ndarray, "C S"]], Float[np.ndarray, " K"]]
    ) -> Float[np.ndarray, "C K"]:
        """Variance of each of K numbers that comes from each configuration's replicas.

            v_c = ½ Σ_s (statistic with replica s replaced by the configuration's next − statistic)²

        to first order; of a mean, with two or three replicas, exactly the classical s²/n.
        """
        rows = self.original()
        value = np.asarray(statistic(rows), dtype=float)
        shares = np.zeros((len(rows), len(value)))
        for share, c in zip(shares, range(len(rows)), strict=True):
            runs = self.replicas[c]
            for s, following in enumerate(np.roll(runs, -1)):
                replaced = rows.copy()
                replaced[c, s] = following
                share += (statistic(replaced) - value) ** 2 / 2
        return shares

    def _replicated(self, arms: Sequence[str]) -> bool:
        return all(
            len(runs) > 1 for runs, arm in zip(self.replicas, self.arms, strict=True) if arm in arms
        )

    # ---- statistics of drawn runs ----------------------------------------------------------------

    def points_of(self, runs: Int[np.ndarray, "..."]) -> Int[np.ndarray, " M"]:
        """Indices of the points of some runs, as often as a run is drawn."""
        return np.concatenate([self._points_of[r] for r in runs.ravel() if r >= 0])

    def _arm_rows(self, arm: str) -> Int[np.ndarray, " A"]:
        return np.array([c for c, name in enumerate(self.arms) if name == arm])

    def whole_sets(self, drawn: Int[np.ndarray, "C S"], arm: str) -> Int[np.ndarray, "A Z"]:
        """Z sets of one run of every configuration of an arm; Z: replicas of that which has most.

        A configuration with fewer replicas takes part in the later sets with its first ones again.
        A set that lacked it would cover and attain less, whatever the runs are worth.
        """
        rows = drawn[self._arm_rows(arm)]
        counts = (rows >= 0).sum(1, keepdims=True)
        return np.take_along_axis(rows, np.arange(counts.max()) % counts, axis=1)

    def share_on_front(self, drawn: Int[np.ndarray, "C S"]) -> Float[np.ndarray, " A"]:
        """Share of the common front's points that each arm has; the shares add up to 1."""
        index = self.points_of(drawn)
        front = index[pareto_front(self.points[index])]
        arm_of = np.array([self.names.index(arm) for arm in self.arms])
        owners = arm_of[self.configurations[self.runs[front]]]
        return np.bincount(owners, minlength=len(self.names)) / len(front)

    def hypervolumes(
        self, drawn: Int[np.ndarray, "C S"], reference_point: tuple[float, float]
    ) -> Float[np.ndarray, " A"]:
        """Hypervolume of each arm: the mean over its whole sets, which more seeds do not raise."""
        volumes = []
        for arm in self.names:
            sets = [self.points[self.points_of(runs)] for runs in self.whole_sets(drawn, arm).T]
            volumes.append(np.mean([hypervolume(s, reference_point) for s in sets]))
        return np.array(volumes)

    def best_within(self, kls: Float[np.ndarray, " K"]) -> Float[np.ndarray, "R K"]:
        """Each run's best reward among its points of no more than each KL; −inf if it has none."""
        best = np.full((len(self.configurations), len(kls)), -np.inf)
        reward = np.where(self.points[:, :1] <= kls, self.points[:, 1:], -np.inf)
        np.maximum.at(best, self.runs, reward)
        return best

    def attained(
        self,
        drawn: Int[np.ndarray, "C S"],
        arm: str,
        best_within: Float[np.ndarray, "R K"],
        floor: float,
    ) -> Float[np.ndarray, " K"]:
        """Reward that at least half of an arm's whole sets attain within each of K KLs.

        The floor is the reward of the reference itself, which every set attains with no KL.
        """
        best = best_within[self.whole_sets(drawn, arm)].max(0)  # [Z, K]
        best = np.sort(np.maximum(best, floor), axis=0)[::-1]
        return best[int(np.ceil(len(best) / 2)) - 1]

    def means(self, drawn: Int[np.ndarray, "C S"]) -> Float[np.ndarray, "C 2"]:
        """(KL, reward) of each configuration: the mean over its drawn replicas' ends."""
        ends = self.points[self.ends]  # [R, 2]
        there = (drawn >= 0)[..., None]
        return np.where(there, ends[drawn], 0.0).sum(1) / there.sum(1)

    def reward_at(
        self, drawn: Int[np.ndarray, "C S"], arm: str, kls: Float[np.ndarray, " K"]
    ) -> Float[np.ndarray, " K"]:
        """An arm's reward at each KL, linear between its configurations' means."""
        curve = self.means(drawn)[self._arm_rows(arm)]
        curve = curve[np.argsort(curve[:, 0])]
        return np.interp(kls, curve[:, 0], curve[:, 1])

    def common_range(self, first: str, second: str) -> tuple[float, float] | None:
        """The KLs that both arms' configurations span; None where they do not overlap."""
        means = self.means(self.original())
        spans = [means[self._arm_rows(arm), 0] for arm in (first, second)]
        low, high = max(s.min() for s in spans), min(s.max() for s in spans)
        return (float(low), float(high)) if low < high else None
