"""The KL of a language model from its reference: values, gradients, and how to use them.

Needs torch alone. Read in this order: `estimators` (which estimate), `placement` (where it enters
the update), `coefficient` (how strongly), `divergences` and `adaptive` (between two distributions),
`distillation` (which of them a student is trained on), `sequence` (what is reported, with standard
errors), `response_estimators` and `control_moments` (estimates from whole responses), `off_policy`
(responses of another policy), `tabular` (the truth, by enumeration), `fused` (the same quantities
from hidden states, without the logits).
"""

from rlkl.kl.adaptive import HeadTailGaps, adaptive_kl, head_tail_gaps, reference_head
from rlkl.kl.coefficient import AdaptiveKLCoefficient, FixedKLCoefficient, KLCoefficient
from rlkl.kl.control_moments import ControlEstimate, ControlMoments
from rlkl.kl.distillation import DIVERGENCES, Divergence, DivergenceClaims, get_divergence
from rlkl.kl.divergences import (
    forward_kl,
    forward_reverse_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
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
    LowRank,
    ModuleHead,
    OutputHead,
    TokenLogp,
    TokenStats,
    TopK,
    fused_divergence,
    fused_logp_loss,
    fused_token_logp,
    fused_token_loss,
    fused_token_stats,
    head_logits,
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
    "DIVERGENCES",
    "ESTIMATORS",
    "RESPONSE_ESTIMATORS",
    "AdaptiveKLCoefficient",
    "Claims",
    "ControlEstimate",
    "ControlMoments",
    "ControlVariateEstimator",
    "Divergence",
    "DivergenceClaims",
    "Estimator",
    "FixedKLCoefficient",
    "HeadTailGaps",
    "HorvitzThompson",
    "KLCoefficient",
    "KLPlacement",
    "LowRank",
    "MeanStderr",
    "ModuleHead",
    "Moments",
    "OutputHead",
    "RaoBlackwellEstimator",
    "ResponseClaims",
    "ResponseEstimator",
    "ResponseStatistics",
    "SampledEstimator",
    "TabularLM",
    "TokenLogp",
    "TokenStats",
    "TopK",
    "TopKBucketEstimator",
    "TopKEstimator",
    "adaptive_kl",
    "check_placement",
    "effective_sample_size",
    "exact_gradient",
    "exact_kl",
    "forward_kl",
    "forward_reverse_kl",
    "fused_divergence",
    "fused_logp_loss",
    "fused_token_logp",
    "fused_token_loss",
    "fused_token_stats",
    "future_kl",
    "get_divergence",
    "get_estimator",
    "get_response_estimator",
    "gradient_moments",
    "head_logits",
    "head_tail_gaps",
    "jensen_shannon",
    "kl_rewards",
    "kl_surrogate",
    "mean_and_stderr",
    "per_token_mean_and_stderr",
    "prefix_weighted_surrogate",
    "prefix_weights",
    "reference_head",
    "response_statistics",
    "response_weights",
    "reverse_kl",
    "sequence_kl",
    "skew_kl",
    "skew_reverse_kl",
    "surrogate_moments",
    "token_ratio_surrogate",
    "token_ratios",
    "truncated_fraction",
    "value_moments",
]
