"""Estimates of the sequence KL that act on whole responses, each with what it may claim.

A token-level estimator (`rlkl.kl.estimators`) gives a k_t per token and is differentiated. The
estimators here need a response, or several, to say anything: they are for measuring a KL, not for
training on it. With u_t, D_t and h_t as there, of a response y of the policy π,

    U = Σ_t u_t = log π(y) - log q(y)        w = q(y)/π(y) = e^{-U}        E[w] = 1
    M_t = u_t - D_t                          a martingale difference: E[M_t | h_t] = 0

    name           value of a response       coefficient             unbiased  ≥ 0  needs
    cv             U + α (w - 1)             α = 1                   yes       yes  log_ratio
    cv_fitted      U + α (w - 1)             fitted                  yes       no   log_ratio
    mcv            Σ_t D_t + λ Σ_t M_t       fitted                  yes       no   token_kl
    mcv_positions  Σ_t D_t + Σ_t λ_t M_t     fitted, shrunk to one   yes       no   token_kl
    ht             over the distinct responses: `HorvitzThompson`    yes       no   response_logp

in nats per response; the estimate is the mean over responses. The first four are one family,
`ControlVariateEstimator`: an anchor A whose mean is the KL, plus coefficients times controls C
whose mean is 0. Any fixed coefficients leave it unbiased, and -Cov(C)⁻¹ Cov(C, A) gives the least
variance. Coefficients fitted to the responses that they are applied to would bias it; so they are
*cross-fitted*: the responses are divided into folds, and those of a fold get coefficients fitted to
the other folds.

Why mcv. λ = 0 is rb (Σ D_t), λ = 1 is k1 (Σ u_t), and neither is always better: in the example of
two steps in `RaoBlackwellEstimator` Var(k1) = 3.31591 and Var(rb) = 5.06974, since what the sampled
token says is correlated with the KL of the steps to come. With its best λ, mcv is asymptotically
never worse than either: 2.94458 there, and with one λ per step the variance is 0.

Valid for responses sampled from π at its temperature, without top-k or top-p. w needs the policy to
give mass to every response that the reference gives mass to, and w has heavy tails: the paper's
control variate (cv) can vary far more than k1.

References:
    cv, ht: Better Estimation of the KL Divergence Between Language Models (Amini, Vieira and
        Cotterell, 2025), https://arxiv.org/abs/2504.10637
    ht: A Generalization of Sampling Without Replacement From a Finite Universe (Horvitz and
        Thompson, 1952), https://doi.org/10.1080/01621459.1952.10483446
    mcv: of this library.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.control_moments import ControlEstimate, ControlMoments
from rlkl.kl.off_policy import prefix_weights


class ResponseStatistics(NamedTuple):
    """What the estimators know of n sampled responses; float64, nats."""

    log_ratio: Float[Tensor, " n"]
    """U = Σ_t u_t."""
    excess: Float[Tensor, " n"]
    """w - 1 = q(y)/π(y) - 1."""
    token_kl: Float[Tensor, " n"]
    """Σ_t D_t."""
    martingale: Float[Tensor, "n T"]
    """M_t = u_t - D_t, 0 where masked."""
    policy_logp: Float[Tensor, " n"] | None
    """log π(y); None if another policy sampled."""


def response_statistics(
    policy_token_logp: Float[Tensor, "n T"],
    ref_token_logp: Float[Tensor, "n T"],
    token_kl: Float[Tensor, "n T"],
    mask: Bool[Tensor, "n T"],
    *,
    sampler_token_logp: Float[Tensor, "n T"] | None = None,
    truncate_at: float | None = None,
) -> ResponseStatistics:
    """Sums over each response of what is known of its tokens; detached.

    With `sampler_token_logp`, the responses are those of another policy μ, and each term is
    weighted so that its mean under μ is its mean under π: W_t D_t, W_{t+1} u_t and w - 1 times
    π(y)/μ(y), W the prefix weights of `rlkl.kl.off_policy`. M_t = W_{t+1} u_t - W_t D_t still has
    mean 0. Of a response that π gives no probability, terms of weight 0 are 0, and the last is
    q(y)/μ(y).

    Args:
        policy_token_logp: log π(y_t|h_t).
        ref_token_logp: log q(y_t|h_t).
        token_kl: D_t, the exact token KL (estimator rb, or `fused_token_stats`).
        mask: True = response token.
        sampler_token_logp: log μ(y_t|h_t); None if π itself sampled.
        truncate_at: largest weight; see `prefix_weights` for what that biases.

    Example:
        >>> policy, ref = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> d, mask = torch.tensor([[0.14, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> s = response_statistics(policy, ref, d, mask)
        >>> [round(x.item(), 4) for x in (s.log_ratio, s.token_kl, s.martingale[0, 0])]
        [0.6931, 0.14, 0.5531]
    """

    def real(x: Tensor) -> Tensor:
        return torch.where(mask, x.detach().double(), 0.0)

    policy, ref, d = real(policy_token_logp), real(ref_token_logp), real(token_kl)
    u = policy - ref
    excess = torch.expm1(-u.sum(1))
    if sampler_token_logp is None:
        return ResponseStatistics(u.sum(1), excess, d.sum(1), u - d, policy.sum(1))
    sampler = real(sampler_token_logp)
    logps = policy, sampler, mask
    before = prefix_weights(*logps, truncate_at=truncate_at)
    through = prefix_weights(*logps, truncate_at=truncate_at, own_token=True)
    d, u = torch.where(before > 0, before * d, 0.0), torch.where(through > 0, through * u, 0.0)
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    # (w - 1) π(y)/μ(y) = (q(y) - π(y))/μ(y), by the form that keeps its digits where π(y) > 0.
    excess = torch.where(
        policy.sum(1) > -torch.inf,
        excess * through.gather(1, last).squeeze(1),
        (ref - sampler).sum(1).exp(),
    )
    return ResponseStatistics(u.sum(1), excess, d.sum(1), u - d, None)


@dataclass(frozen=True)
class ResponseClaims:
    """What a response-level estimator promises of its estimate; each is tested by enumeration."""

    unbiased: bool
    """Its expectation is D_KL(policy ‖ ref) of the sequence, for every number of responses."""

    non_negative: bool
    """Every response's value is ≥ 0."""

    needs: Literal["log_ratio", "token_kl", "response_logp"]
    """U alone; u_t and D_t of every token; or U, log π(y) and which responses are equal."""


@dataclass(frozen=True)
class ResponseEstimator(ABC):
    """An estimate of the sequence KL from n responses, as the mean of a value for each."""

    name: str
    claims: ResponseClaims

    @abstractmethod
    def __call__(
        self, statistics: ResponseStatistics, groups: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """The value of each response, in nats; the estimate is their mean.

        Args:
            statistics: of n responses.
            groups: a number for each response, whose meaning is the estimator's: its fold
                (`ControlVariateEstimator`), or which are equal (`HorvitzThompson`).
        """


@final
@dataclass(frozen=True)
class ControlVariateEstimator(ResponseEstimator):
    """A_i + Σ_p c_p C_ip: an anchor whose mean is the KL, plus controls whose mean is 0.

    Example:
        >>> mcv = get_response_estimator("mcv")
        >>> statistics = ResponseStatistics(
        ...     log_ratio=torch.tensor([1.0, 2.0, 1.0, 2.0]),
        ...     excess=torch.zeros(4),
        ...     token_kl=torch.tensor([2.0, 1.0, 2.0, 1.0]),
        ...     martingale=torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]),
        ...     policy_logp=None,
        ... )
        >>> mcv(statistics, groups=torch.tensor([0, 0, 1, 1]))  # λ = ½: half k1, half rb
        tensor([1.5000, 1.5000, 1.5000, 1.5000], dtype=torch.float64)
    """

    terms: Callable[[ResponseStatistics], tuple[Tensor, Tensor]]
    """Anchor `[n]` and controls `[n, P]` of n responses; P must be the same in every batch."""
    coefficient: float | None
    """Given, or None: fitted on the other folds."""
    shrinkage: float = 0.0
    """Pseudo-responses per control that pull fitted coefficients together (`fit_coefficients`)."""

    def __call__(
        self, statistics: ResponseStatistics, groups: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Values with each response's fold in `groups`: 0..K-1, two or more to fit anything."""
        anchor, controls = self.terms(statistics)
        moments = ControlMoments.zeros(
            controls=controls.shape[1], folds=int(groups.max()) + 1, prompts=1
        )
        moments.add(anchor, controls, fold=groups, prompt=torch.zeros_like(groups))
        return anchor + (controls * self._coefficients(moments)[groups]).sum(1)

    def estimate(self, moments: ControlMoments) -> ControlEstimate:
        """The estimate from the moments of `terms`, added batch by batch, in nats per response."""
        return moments.estimate(self._coefficients(moments))

    def _coefficients(self, moments: ControlMoments) -> Float[Tensor, "K P"]:
        """A fold without others gets 0: with nothing to fit to, the anchor stands alone."""
        if self.coefficient is None:
            return moments.fit_others(self.shrinkage)
        return torch.full_like(moments.responses[:, 2:, 0], self.coefficient)


@final
@dataclass(frozen=True)
class HorvitzThompson(ResponseEstimator):
    """Σ over the distinct responses y of m draws of π(y) U(y) / (1 - (1 - π(y))^m).

    The denominator is the probability that y is among m independent draws, so that each response
    of the model counts with its own probability. The value of a draw is x_i = m π(y_i) U(y_i) over
    that probability times the number of draws equal to y_i. Where no response is drawn twice and
    π(y) is small, as with long responses, it is k1.

    Valid for the m responses drawn together for *one* prompt; average several such groups.

    Example:
        >>> ht = get_response_estimator("ht")
        >>> statistics = ResponseStatistics(
        ...     log_ratio=torch.tensor([1.0, 1.0]),
        ...     excess=torch.zeros(2),
        ...     token_kl=torch.zeros(2),
        ...     martingale=torch.zeros(2, 1),
        ...     policy_logp=torch.tensor([0.5, 0.5]).log(),
        ... )
        >>> ht(statistics, groups=torch.tensor([0, 0])).mean()  # ½ / (1 - ½²), drawn twice
        tensor(0.6667)
    """

    def __call__(
        self, statistics: ResponseStatistics, groups: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Values of one prompt's draws; equal responses have equal numbers in `groups`.

        Raises:
            ValueError: the responses were sampled from another policy.
        """
        if statistics.policy_logp is None:
            raise ValueError(
                "statistics are those of another policy's responses; ht needs the probability "
                "with which each was drawn: sample from the policy, or use mcv"
            )
        draws = len(groups)
        prob = statistics.policy_logp.clamp(max=0).exp()  # rounding may leave log π(y) above 0
        drawn = -torch.expm1(draws * torch.log1p(-prob))
        # As π(y) goes to 0 the ratio goes to 1; exp underflows to 0 first.
        ratio = torch.where(prob > 0, draws * prob / drawn.where(prob > 0, 1.0), 1.0)
        _, inverse, repeats = groups.unique(return_inverse=True, return_counts=True)
        return ratio * statistics.log_ratio / repeats[inverse]


def _ratio_terms(s: ResponseStatistics) -> tuple[Tensor, Tensor]:
    return s.log_ratio, s.excess.unsqueeze(1)


def _martingale_terms(s: ResponseStatistics) -> tuple[Tensor, Tensor]:
    return s.token_kl, s.martingale.sum(1, keepdim=True)


def _position_terms(s: ResponseStatistics) -> tuple[Tensor, Tensor]:
    return s.token_kl, s.martingale


RESPONSE_ESTIMATORS: dict[str, ResponseEstimator] = {
    estimator.name: estimator
    for estimator in (
        ControlVariateEstimator(
            name="cv",
            claims=ResponseClaims(unbiased=True, non_negative=True, needs="log_ratio"),
            terms=_ratio_terms,
            coefficient=1.0,
        ),
        ControlVariateEstimator(
            name="cv_fitted",
            claims=ResponseClaims(unbiased=True, non_negative=False, needs="log_ratio"),
            terms=_ratio_terms,
            coefficient=None,
        ),
        ControlVariateEstimator(
            name="mcv",
            claims=ResponseClaims(unbiased=True, non_negative=False, needs="token_kl"),
            terms=_martingale_terms,
            coefficient=None,
        ),
        ControlVariateEstimator(
            name="mcv_positions",
            claims=ResponseClaims(unbiased=True, non_negative=False, needs="token_kl"),
            terms=_position_terms,
            coefficient=None,
            shrinkage=2.0,
        ),
        HorvitzThompson(
            name="ht",
            claims=ResponseClaims(unbiased=True, non_negative=False, needs="response_logp"),
        ),
    )
}
"""Every response-level estimator by name."""


def get_response_estimator(name: str) -> ResponseEstimator:
    """The response-level estimator of that name.

    Raises:
        ValueError: there is none; the message lists those there are.

    Example:
        >>> get_response_estimator("mcv").claims.needs
        'token_kl'
    """
    if name not in RESPONSE_ESTIMATORS:
        raise ValueError(
            f"response estimator {name!r} is unknown; use one of {', '.join(RESPONSE_ESTIMATORS)}"
        )
    return RESPONSE_ESTIMATORS[name]
