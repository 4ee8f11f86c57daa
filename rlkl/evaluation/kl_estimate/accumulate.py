"""Batches of measured responses in, running sums out: nothing of it grows with their number."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkl.evaluation.kl_estimate.draws import Draws
from rlkl.evaluation.kl_estimate.measure import Measured
from rlkl.evaluation.kl_estimate.report import Estimate, Profile
from rlkl.evaluation.kl_estimate.units import Interval, Units, UnitSums, ratio
from rlkl.kl import ESTIMATORS


@dataclass(frozen=True)
class Weights:
    """Importance weights that make responses of the sampler μ stand for the policy's.

    W_t = Π_{s<t} π(y_s|h_s)/μ(y_s|h_s) for what depends on the prefix alone, W_{t+1} for what
    depends on y_t too, and the whole product for the response; all 1 where the policy sampled.
    """

    prefix: Tensor
    """[B, T] W_t."""
    own: Tensor
    """[B, T] W_{t+1}."""
    response: Tensor
    """[B]"""
    cut: int = 0
    """How many were cut at their limit."""

    @classmethod
    def ones(cls, mask: Tensor) -> "Weights":
        """The policy sampled."""
        one = torch.ones(mask.shape, dtype=torch.float64)
        return cls(one, one, torch.ones(len(mask), dtype=torch.float64))


@dataclass
class Totals:
    """Plain sums over responses."""

    n: int = 0
    tokens: int = 0
    truncated: int = 0
    weight: float = 0.0
    weight_squared: float = 0.0
    cut_weights: int = 0
    ref_weight: float = 0.0
    ref_weight_squared: float = 0.0
    negative: dict[str, int] = field(default_factory=dict)


class Accumulator:
    """Sums per independent unit, from which every estimate and its error follow."""

    def __init__(self, units: Units, off_policy: bool = False) -> None:
        self.units, self.sums = units, UnitSums(units)
        self.totals = Totals()
        self.off_policy = off_policy

    def add(self, draws: Draws, measured: Measured, weights: Weights) -> None:
        """Adds a batch."""
        mask = measured.mask
        kl, log_ratio = measured.k["rb"], measured.k["k1"]
        response = {
            name: (_weight_of(name, weights) * k * mask).sum(1) for name, k in measured.k.items()
        }
        ref_over_policy = torch.expm1(-log_ratio.sum(1))  # q(y)/π(y) − 1
        control = weights.response * ref_over_policy
        response["cv"] = response["k1"] + control
        alive = mask.double()
        self.sums.add(
            self.units.index(draws.prompt, draws.repetition),
            {
                "n": torch.ones(len(mask)),
                "length": (weights.prefix * alive).sum(1),
                "ref_over_policy": control,
                "martingale": (weights.own * (log_ratio - kl) * mask).sum(1),
                "position_length": weights.prefix * alive,
                "position_rb": weights.prefix * kl,
                "position_k1": weights.own * log_ratio,
                **{f"sum_{name}": value for name, value in response.items()},
            },
        )
        totals, sampler = self.totals, weights.response
        totals.n += len(mask)
        totals.tokens += int(mask.sum())
        totals.truncated += int((~draws.responses.ended).sum())
        totals.weight += float(sampler.sum())
        totals.weight_squared += float(sampler.square().sum())
        totals.cut_weights += weights.cut
        totals.ref_weight += float((1 + ref_over_policy).sum())
        totals.ref_weight_squared += float((1 + ref_over_policy).square().sum())
        for name, value in response.items():
            below = int((value < 0).sum())
            totals.negative[name] = totals.negative.get(name, 0) + below

    def estimates(self) -> dict[str, Estimate]:
        """Every estimator's answer so far."""
        sums = self.sums
        results = {
            name: self._estimate(sums[f"sum_{name}"], unbiased, name)
            for name, unbiased in [*_token_level(), ("cv", True)]
        }
        return results

    def interval(self, name: str) -> Interval:
        """Mean and error of one token-level estimator, for a stopping rule."""
        counts = self.sums["n"]
        return ratio(self.sums[f"sum_{name}"], counts, counts, self.units)

    def _estimate(self, total: Tensor, unbiased: bool, name: str | None) -> Estimate:
        counts = self.sums["n"]
        whole = ratio(total, counts, counts, self.units)
        token = ratio(total, self.sums["length"], counts, self.units)
        mean, half = float(whole.mean), float(whole.half_width)
        negative = None if name is None else self.totals.negative[name] / self.totals.n
        return Estimate(
            nats_per_response=mean,
            stderr=float(whole.stderr),
            ci95=(mean - half, mean + half),
            nats_per_token=float(token.mean),
            nats_per_token_stderr=float(token.stderr),
            n=self.totals.n,
            unbiased=unbiased,
            negative_fraction=negative,
        )

    def profile(self) -> Profile:
        """D_t and u_t by position."""
        size, counts = self.sums["position_length"], self.sums["n"]
        exact = ratio(self.sums["position_rb"], size, counts, self.units)
        sampled = ratio(self.sums["position_k1"], size, counts, self.units)
        return Profile(
            kl=exact.mean.tolist(),
            half_width=exact.half_width.tolist(),
            sampled=sampled.mean.tolist(),
            sampled_half_width=sampled.half_width.tolist(),
            responses=(size.sum(0) / size[:, 0].sum()).tolist(),
        )

    @property
    def used_units(self) -> int:
        """Units with at least one response."""
        return int((self.sums["n"] > 0).sum())

    @property
    def ess(self) -> float:
        """(Σw)² / Σw² of the sampler's weights."""
        return self.totals.weight**2 / self.totals.weight_squared

    @property
    def ess_ref(self) -> float:
        """The same of q(y)/π(y)."""
        squared = self.totals.ref_weight_squared
        return self.totals.ref_weight**2 / squared if math.isfinite(squared) and squared else 0.0


def _token_level() -> list[tuple[str, bool]]:
    return [(name, estimator.claims.unbiased) for name, estimator in ESTIMATORS.items()]


def _weight_of(name: str, weights: Weights) -> Tensor:
    """What depends on y_t is weighted with y_t's ratio too."""
    return weights.own if ESTIMATORS[name].claims.own_token else weights.prefix
