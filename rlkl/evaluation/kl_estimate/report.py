"""The records that an estimate of the KL ends in, and their form in JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from rlkl.evaluation.kl_estimate.units import Estimand

KIND = {
    "k1": "sampled log-ratio",
    "k2": "half its square",
    "k3": "log-ratio with control variate, per token",
    "rb": "exact per token",
    "topk": "exact for the 64 likeliest tokens, sampled beyond",
    "topk_bucket": "64 likeliest tokens, the rest as one: a lower bound",
    "cv": "log-ratio with control variate, per response",
    "cv_fitted": "the same, its weight fitted",
    "ht": "over distinct responses",
    "mcv": "rb with fitted control variate",
    "mcv_positions": "the same, one weight per position",
}
"""What each estimator is, in a few words for a table."""


@dataclass(frozen=True)
class Estimate:
    """One estimator's answer."""

    nats_per_response: float
    stderr: float
    """Standard error of `nats_per_response`; inf where one independent unit says nothing of it."""
    ci95: tuple[float, float]
    """95% interval of `nats_per_response`."""
    nats_per_token: float
    """Σ k / number of tokens."""
    nats_per_token_stderr: float
    n: int
    """Responses."""
    unbiased: bool
    """Its expectation is the KL; no estimator's is where importance weights were cut."""
    negative_fraction: float | None
    """Share of responses whose own estimate is below 0, which no KL is; None where an estimate
    exists only for all responses together."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the share of negative estimates has a key of its own in the report."""
        record = asdict(self)
        del record["negative_fraction"]
        return record


@dataclass(frozen=True)
class Profile:
    """D_t by position, over the responses that are that long; entry i is position i + 1."""

    kl: list[float]
    """Mean exact token KL at that position, in nats."""
    half_width: list[float]
    """Half of its 95% interval; inf where one independent unit alone is that long."""
    sampled: list[float]
    """Mean sampled log-ratio u_t at that position."""
    sampled_half_width: list[float]
    responses: list[float]
    """Share of responses that reach the position."""


@dataclass(frozen=True)
class TokenShare:
    """What one token of the vocabulary adds to the KL, summed over all visited prefixes."""

    token: str
    share: float
    """Of the KL: Σ [π log(π/q) − π + q] for this token over the same sum for all tokens."""
    policy: float
    """Mean probability under the policy, over the visited prefixes."""
    ref: float
    """Mean probability under the reference."""


@dataclass(frozen=True)
class Likely:
    """A token that is likely at some prefix."""

    token: str
    policy: float
    ref: float


@dataclass(frozen=True)
class WideContext:
    """A prefix at which the two models part."""

    text: str
    kl: float
    """D_t there, in nats."""
    policy_top: list[Likely]
    ref_top: list[Likely]


@dataclass(frozen=True)
class SampleToken:
    """A token of a sample response."""

    token: str
    kl: float
    """D_t at the prefix before it."""
    policy: float
    """Probability of the token under the policy."""
    ref: float


@dataclass(frozen=True)
class Sample:
    """A response, token by token: the first ones that were drawn, not picked."""

    prompt: str
    tokens: list[SampleToken]
    ended: bool

    @property
    def kl(self) -> float:
        """Σ D_t."""
        return sum(token.kl for token in self.tokens)


@dataclass(frozen=True)
class KLReport:
    """D_KL(policy ‖ ref) of the response, by every estimator on the same responses."""

    policy: str
    ref: str
    estimators: dict[str, Estimate]
    headline: str
    """The estimator to quote."""
    n: int
    prompts: int
    """Prompts with at least one response."""
    tokens: int
    ess: float
    """Effective sample size (Σw)² / Σw² of the weights w = π(y)/μ(y) that make responses of the
    sampler μ stand for the policy's; n where the policy sampled."""
    ess_ref: float
    """The same of w = q(y)/π(y): how far the responses stand for the reference's. Small: cv and
    other estimates that use this weight are not to be trusted."""
    truncated_fraction: float
    """Share of responses cut at the length limit."""
    truncated_weights: float
    """Share of importance weights cut at their limit."""
    seconds: float
    sampling_seconds: float
    estimand: Estimand
    units: int
    """Independent units behind each standard error."""
    max_tokens: int
    """Length limit of a response, or the longest in the file."""
    temperature: float
    interrupted: bool
    profile: Profile
    top_tokens: list[TokenShare]
    contexts: list[WideContext]
    samples: list[Sample]
    notes: tuple[str, ...]
    """What a reader has to know, one sentence each."""

    @property
    def best(self) -> Estimate:
        """The estimate to quote."""
        return self.estimators[self.headline]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the keys that the command line documents."""
        return {
            "policy": self.policy,
            "ref": self.ref,
            "estimators": {name: e.to_dict() for name, e in self.estimators.items()},
            "negative_fraction": {
                name: e.negative_fraction
                for name, e in self.estimators.items()
                if e.negative_fraction is not None
            },
            "ess": self.ess,
            "ess_ref": self.ess_ref,
            "truncated_fraction": self.truncated_fraction,
            "truncated_weights": self.truncated_weights,
            "tokens": self.tokens,
            "n": self.n,
            "prompts": self.prompts,
            "units": self.units,
            "seconds": self.seconds,
            "sampling_seconds": self.sampling_seconds,
            "headline": self.headline,
            "estimand": str(self.estimand),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "interrupted": self.interrupted,
            "profile": asdict(self.profile),
            "top_tokens": [asdict(token) for token in self.top_tokens],
            "contexts": [asdict(context) for context in self.contexts],
            "notes": list(self.notes),
        }
