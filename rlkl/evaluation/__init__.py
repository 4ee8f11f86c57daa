"""How good a policy is: score, judges and KL on held-out prompts; the optimum and best-of-n; the KL
between any two language models.
"""

from rlkl.evaluation.best_of_n import (
    BestOfN,
    BestOfNPoint,
    best_of_n,
    best_of_n_curve,
    sample_scores,
)
from rlkl.evaluation.kl_estimate import KLReport, estimate_kl
from rlkl.evaluation.optimal_tilt import OptimalTilt, TiltPoint
from rlkl.evaluation.policy import Evaluation, evaluate_policy

__all__ = [
    "BestOfN",
    "BestOfNPoint",
    "Evaluation",
    "KLReport",
    "OptimalTilt",
    "TiltPoint",
    "best_of_n",
    "best_of_n_curve",
    "estimate_kl",
    "evaluate_policy",
    "sample_scores",
]
