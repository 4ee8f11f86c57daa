"""The KL of a language model from its reference: values, gradients, and how to use them.

Needs torch alone. Read in this order: `estimators` (which estimate), `placement` (where it enters
the update), `coefficient` (how strongly), `divergences` and `adaptive` (between two distributions),
`distillation` (which of them a student is trained on), `sequence` (what is reported, with standard
errors), `tabular` (the truth, by enumeration), `fused` (the same quantities from hidden states,
without the logits).
"""

from rlkl.kl.adaptive import HeadTailGaps, adaptive_kl, head_tail_gaps, reference_head
from rlkl.kl.coefficient import AdaptiveKLCoefficient, FixedKLCoefficient, KLCoefficient
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
from rlkl.kl.placement import KLPlacement, future_kl, kl_rewards, kl_surrogate
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
    "AdaptiveKLCoefficient",
    "Claims",
    "Divergence",
    "DivergenceClaims",
    "Estimator",
    "FixedKLCoefficient",
    "HeadTailGaps",
    "KLCoefficient",
    "KLPlacement",
    "LowRank",
    "MeanStderr",
    "ModuleHead",
    "Moments",
    "OutputHead",
    "RaoBlackwellEstimator",
    "SampledEstimator",
    "TabularLM",
    "TokenLogp",
    "TokenStats",
    "TopK",
    "adaptive_kl",
    "check_placement",
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
    "gradient_moments",
    "head_logits",
    "head_tail_gaps",
    "jensen_shannon",
    "kl_rewards",
    "kl_surrogate",
    "mean_and_stderr",
    "per_token_mean_and_stderr",
    "reference_head",
    "reverse_kl",
    "sequence_kl",
    "skew_kl",
    "skew_reverse_kl",
    "surrogate_moments",
    "value_moments",
]
