"""Batches of measured responses in, running sums out: nothing of it grows with their number."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkl.evaluation.kl_estimate.draws import Draws
from rlkl.evaluation.kl_estimate.measure import Measured
from rlkl.evaluation.kl_estimate.report import Estimate, Profile
from rlkl.evaluation.kl_estimate.units import Interval, Units, UnitSums, ratio
from rlkl.kl import (
    ESTIMATORS,
    RESPONSE_ESTIMATORS,
    ControlMoments,
    ControlVariateEstimator,
    HorvitzThompson,
    RaoBlackwellEstimator,
    ResponseStatistics,
    TopKBucketEstimator,
    prefix_weights,
)

_FOLDS = 5
MAX_POSITIONS = 512
"""Longest response for which there is one coefficient per position: products of all pairs of
positions are kept, which at ten times the length would be gigabytes."""


@dataclass(frozen=True)
class Weights:
    """Importance weights that make responses of the sampler μ stand for the policy's.

    W_t = Π_{s<t} π(y_s|h_s)/μ(y_s|h_s) for what depends on the prefix alone, W_{t+1} for what
    depends on y_t too, and the whole product for the response. All 1 where the policy sampled;
    all the whole product where nothing else is known.
    """

    prefix: Tensor
    """[B, T] W_t."""
    own: Tensor
    """[B, T] W_{t+1}."""
    response: Tensor
    """[B]"""
    on_policy: bool
    cut: int = 0
    """How many of the W_{t+1} of real tokens were cut at `truncate_at`."""

    @classmethod
    def of(cls, draws: Draws, measured: Measured, truncate_at: float | None) -> "Weights":
        """From what is known of the sampler.

        Raises:
            ValueError: `truncate_at` is below 1.
        """
        mask = measured.mask
        ones = torch.ones(mask.shape, dtype=torch.float64)
        if draws.sampler_logp is not None:
            logps = measured.policy_logp, draws.sampler_logp, mask
            prefix = prefix_weights(*logps, truncate_at=truncate_at)
            own = prefix_weights(*logps, truncate_at=truncate_at, own_token=True)
            last = mask.sum(1, keepdim=True) - 1
            whole = prefix_weights(*logps, own_token=True)
            cut = 0 if truncate_at is None else int((whole > truncate_at)[mask].sum())
            return cls(prefix, own, own.gather(1, last).squeeze(1), False, cut)
        if draws.sampler_response_logp is not None:
            policy_logp = (measured.policy_logp * mask).sum(1)
            whole = (policy_logp - draws.sampler_response_logp).exp()
            response = whole if truncate_at is None else whole.clamp(max=truncate_at)
            cut = int(((whole > response)[:, None] & mask).sum())
            spread = ones * response[:, None]
            return cls(spread, spread, response, False, cut)
        return cls(ones, ones, ones[:, 0], True)


@dataclass
class Totals:
    """Plain sums over responses."""

    n: int = 0
    prompts: int = 0
    tokens: int = 0
    truncated: int = 0
    cut_weights: int = 0
    weight: float = 0.0
    weight_squared: float = 0.0
    ref_weight: float = 0.0
    ref_weight_squared: float = 0.0
    negative: dict[str, int] = field(default_factory=dict)


class Accumulator:
    """Sums per independent unit, from which every estimate and its error follow.

    Estimators with fitted coefficients also need sums of products, per fold; folds are made of
    whole strata where there are enough of them, so that no unit is fitted to itself or its like.
    """

    def __init__(self, units: Units, max_tokens: int) -> None:
        """Args: the units; the largest number of tokens that a response may have."""
        self.units, self.max_tokens = units, max_tokens
        self.sums, self.totals = UnitSums(units), Totals()
        self._moments: dict[str, ControlMoments] = {}
        self._response_estimators = {
            name: estimator
            for name, estimator in RESPONSE_ESTIMATORS.items()
            if name != "mcv_positions" or max_tokens <= MAX_POSITIONS
        }

    def add(self, draws: Draws, measured: Measured, weights: Weights) -> None:
        """Adds a batch."""
        mask, unit = measured.mask, self.units.index(draws.prompt, draws.repetition)
        weighted = {name: _weight_of(name, weights) * k for name, k in measured.k.items()}
        values = {name: (k * mask).sum(1) for name, k in weighted.items()}
        statistics = self._statistics(measured, weights)
        for name, estimator in self._response_estimators.items():
            if isinstance(estimator, ControlVariateEstimator):
                anchor, controls = estimator.terms(statistics)
                if estimator.coefficient is None:
                    self._add_moments(name, anchor, controls, unit)
                else:
                    values[name] = anchor + estimator.coefficient * controls.sum(1)
            elif isinstance(estimator, HorvitzThompson) and weights.on_policy:
                values[name] = _by_prompt(estimator, statistics, draws)
        alive = weights.prefix * mask
        self.sums.add(
            unit,
            {
                "n": torch.ones(len(mask)),
                "length": alive.sum(1),
                "position_n": mask,
                "position_length": alive,
                "position_rb": weighted["rb"],
                "position_k1": weighted["k1"],
                "control_cv": statistics.excess,
                "control_k3": (weights.own * torch.expm1(-measured.k["k1"])).sum(1),
                **{_sum_of(name): value for name, value in values.items()},
            },
        )
        totals, ref_over_policy = self.totals, 1 + torch.expm1(-measured.k["k1"].sum(1))
        totals.n += len(mask)
        totals.prompts = max(totals.prompts, int(draws.prompt.max()) + 1)
        totals.tokens += int(mask.sum())
        totals.truncated += int((~draws.responses.ended).sum())
        totals.cut_weights += weights.cut
        totals.weight += float(weights.response.sum())
        totals.weight_squared += float(weights.response.square().sum())
        totals.ref_weight += float(ref_over_policy.sum())
        totals.ref_weight_squared += float(ref_over_policy.square().sum())
        for name, value in values.items():
            below = int((value < 0).sum())
            totals.negative[name] = totals.negative.get(name, 0) + below

    def _statistics(self, measured: Measured, weights: Weights) -> ResponseStatistics:
        """What the response-level estimators need, weighted; M_t padded to `max_tokens`."""
        kl, log_ratio = weights.prefix * measured.k["rb"], weights.own * measured.k["k1"]
        martingale = kl.new_zeros(len(kl), self.max_tokens)
        martingale[:, : kl.shape[1]] = log_ratio - kl
        policy_logp = measured.policy_logp.sum(1)
        return ResponseStatistics(
            log_ratio=log_ratio.sum(1),
            excess=weights.response * torch.expm1(-measured.k["k1"].sum(1)),
            token_kl=kl.sum(1),
            martingale=martingale,
            policy_logp=policy_logp if weights.on_policy else None,
        )

    def _add_moments(self, name: str, anchor: Tensor, controls: Tensor, unit: Tensor) -> None:
        if name not in self._moments:
            self._moments[name] = ControlMoments.zeros(
                controls=controls.shape[1], folds=_FOLDS, prompts=len(self.units)
            )
        units = self.units
        whole_strata = units.strata >= 2 * _FOLDS
        fold = (unit // units.replicates if whole_strata else unit) % _FOLDS
        self._moments[name].add(anchor, controls, fold=fold, prompt=unit)

    def estimates(self) -> dict[str, Estimate]:
        """Every estimator's answer so far, in the order of the registries."""
        results = {}
        for name, estimator in {**ESTIMATORS, **self._response_estimators}.items():
            if _sum_of(name) in self.sums:
                total, negative = self.sums[_sum_of(name)], self.totals.negative[name]
            elif isinstance(estimator, ControlVariateEstimator):
                total, negative = self._fitted(estimator), None
            else:
                continue  # ht of responses that another policy sampled
            # cv averages the weights q(y)/π(y): a few heavy ones count for all.
            rests_on_weights = estimator.claims.needs == "log_ratio"
            freedom = self.ess_ref - 1 if rests_on_weights else math.inf
            unbiased = estimator.claims.unbiased and not self.totals.cut_weights
            results[name] = self._estimate(total, unbiased, negative, freedom)
        return results

    def _fitted(self, estimator: ControlVariateEstimator) -> Tensor:
        """[U] sums of A + c·C with each fold's coefficients, fitted on the other folds."""
        moments = self._moments[estimator.name]
        coefficients = estimator.estimate(moments).coefficients
        ones = torch.ones_like(coefficients[:, :1])
        return torch.einsum(
            "kz,kuz->u", torch.cat([0 * ones, ones, coefficients], 1), moments.prompts
        )

    def _estimate(
        self, total: Tensor, unbiased: bool, negative: int | None, max_freedom: float
    ) -> Estimate:
        counts = self.sums["n"]
        whole = ratio(total, counts, counts, self.units, max_freedom)
        token = ratio(total, self.sums["length"], counts, self.units)
        mean, half = float(whole.mean), float(whole.half_width)
        return Estimate(
            nats_per_response=mean,
            stderr=float(whole.stderr),
            ci95=(mean - half, mean + half),
            nats_per_token=float(token.mean),
            nats_per_token_stderr=float(token.stderr),
            n=self.totals.n,
            unbiased=unbiased,
            negative_fraction=None if negative is None else negative / self.totals.n,
        )

    def interval(self, name: str) -> Interval:
        """Mean and error of one token-level estimator, for a stopping rule."""
        counts = self.sums["n"]
        return ratio(self.sums[_sum_of(name)], counts, counts, self.units)

    def control(self, name: str) -> Interval:
        """What cv or k3 adds to k1, in nats per response: q/π - 1 of each response or token.

        Its expectation is 0. A mean that is not says how far the estimate is off.
        """
        counts = self.sums["n"]
        return ratio(self.sums[f"control_{name}"], counts, counts, self.units)

    def profile(self) -> Profile:
        """D_t and u_t by position, each from the units whose responses are that long."""
        size, counts = self.sums["position_length"], self.sums["position_n"]

        def at_each(name: str) -> list[Interval]:
            columns = zip(self.sums[name].T, size.T, counts.T, strict=True)
            return [ratio(*column, self.units) for column in columns]

        exact, sampled = at_each("position_rb"), at_each("position_k1")
        return Profile(
            kl=[float(at.mean) for at in exact],
            half_width=[float(at.half_width) for at in exact],
            sampled=[float(at.mean) for at in sampled],
            sampled_half_width=[float(at.half_width) for at in sampled],
            responses=(size.sum(0) / size[:, 0].sum()).tolist(),
        )

    @property
    def used_units(self) -> int:
        """Units with at least one response."""
        return int((self.sums["n"] > 0).sum())

    @property
    def ess(self) -> float:
        """(Σw)² / Σw² of the sampler's weights; 0 where they all vanish."""
        return _ess(self.totals.weight, self.totals.weight_squared)

    @property
    def ess_ref(self) -> float:
        """The same of q(y)/π(y)."""
        return _ess(self.totals.ref_weight, self.totals.ref_weight_squared)


def _ess(total: float, squared: float) -> float:
    return total**2 / squared if squared > 0 and math.isfinite(squared) else 0.0


def _sum_of(name: str) -> str:
    """Under which name the sums of an estimator are kept."""
    return f"sum_{name}"


def _weight_of(name: str, weights: Weights) -> Tensor:
    """What depends on y_t is weighted with y_t's ratio too."""
    exact = isinstance(ESTIMATORS[name], RaoBlackwellEstimator | TopKBucketEstimator)
    return weights.prefix if exact else weights.own


def _by_prompt(estimator: HorvitzThompson, statistics: ResponseStatistics, draws: Draws) -> Tensor:
    """[B] values by the groups of responses that a batch has for one prompt."""
    tokens, mask = draws.responses.tokens.cpu(), draws.responses.mask.cpu()
    distinct = torch.where(mask, tokens, -1).unique(dim=0, return_inverse=True)[1]
    values = torch.empty_like(statistics.log_ratio)
    for prompt in draws.prompt.unique().tolist():
        rows = draws.prompt == prompt
        group = ResponseStatistics(
            log_ratio=statistics.log_ratio[rows],
            excess=statistics.excess[rows],
            token_kl=statistics.token_kl[rows],
            martingale=statistics.martingale[rows],
            policy_logp=None if statistics.policy_logp is None else statistics.policy_logp[rows],
        )
        values[rows] = estimator(group, distinct[rows])
    return values
