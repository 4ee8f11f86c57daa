"""The KL of a language model from its reference: values, gradients, and how to use them.

Needs torch alone. Read in this order: `estimators` (which estimate), `placement` (where it enters
the update), `coefficient` (how strongly), `divergences` (between two distributions), `sequence`
(what is reported, with standard errors), `response_estimators` and `control_moments` (estimates from
whole responses), `off_policy` (responses of another policy), `tabular` (the truth, by enumeration), `fused` (the same
quantities from hidden states, without the logits).
"""

from rlkl.kl.coefficient import AdaptiveKLCoefficient, FixedKLCoefficient, KLCoefficient
from rlkl.kl.control_moments import ControlEstimate, ControlMoments
from rlkl.kl.divergences import forward_kl, jensen_shannon, reverse_kl, reverse_kl_terms
from rlkl.kl.estimators import (
    ESTIMATORS,
    Claims,
    Estimator,
    RaoBlackwellEstimator,
    SampledEstimator,
    TopKBucketEstimator,
    TopKEstimator,
    check_placement,
    get_estimator,
)
from rlkl.kl.fused import (
    TokenLogp,
    TokenStats,
    fused_logp_loss,
    fused_token_logp,
    fused_token_loss,
    fused_token_stats,
)
from rlkl.kl.off_policy import (
    effective_sample_size,
    prefix_weighted_surrogate,
    prefix_weights,
    response_weights,
    token_ratio_surrogate,
    token_ratios,
    truncated_fraction,
)
from rlkl.kl.placement import KLPlacement, future_kl, kl_rewards, kl_surrogate
from rlkl.kl.response_estimators import (
    RESPONSE_ESTIMATORS,
    ControlVariateEstimator,
    HorvitzThompson,
    ResponseClaims,
    ResponseEstimator,
    ResponseStatistics,
    get_response_estimator,
    response_statistics,
)
from rlkl.kl.sequence import MeanStderr, mean_and_stderr, per_token_mean_and_stderr, sequence_kl
from rlkl.kl.tabular import (
    Moments,
    TabularLM,
    exact_gradient,
    exact_kl,
    gradient_moments,
    surrogate_moments,
    value_moments,
)

__all__ = [
    "ESTIMATORS",
    "RESPONSE_ESTIMATORS",
    "AdaptiveKLCoefficient",
    "Claims",
    "ControlEstimate",
    "ControlMoments",
    "ControlVariateEstimator",
    "Estimator",
    "FixedKLCoefficient",
    "HorvitzThompson",
    "KLCoefficient",
    "KLPlacement",
    "MeanStderr",
    "Moments",
    "RaoBlackwellEstimator",
    "ResponseClaims",
    "ResponseEstimator",
    "ResponseStatistics",
    "SampledEstimator",
    "TabularLM",
    "TokenLogp",
    "TokenStats",
    "TopKBucketEstimator",
    "TopKEstimator",
    "check_placement",
    "effective_sample_size",
    "exact_gradient",
    "exact_kl",
    "forward_kl",
    "fused_logp_loss",
    "fused_token_logp",
    "fused_token_loss",
    "fused_token_stats",
    "future_kl",
    "get_estimator",
    "get_response_estimator",
    "gradient_moments",
    "jensen_shannon",
    "kl_rewards",
    "kl_surrogate",
    "mean_and_stderr",
    "per_token_mean_and_stderr",
    "prefix_weighted_surrogate",
    "prefix_weights",
    "response_statistics",
    "response_weights",
    "reverse_kl",
    "reverse_kl_terms",
    "sequence_kl",
    "surrogate_moments",
    "token_ratio_surrogate",
    "token_ratios",
    "truncated_fraction",
    "value_moments",
]
