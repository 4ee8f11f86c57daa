"""How good a policy is: score, judges and KL on held-out prompts, and best-of-n of the
reference; the KL between any two language models.
"""

from rlkl.evaluation.best_of_n import BestOfN, best_of_n
from rlkl.evaluation.kl_estimate import KLReport, estimate_kl
from rlkl.evaluation.policy import Evaluation, evaluate_policy

__all__ = [
    "BestOfN",
    "Evaluation",
    "KLReport",
    "best_of_n",
    "estimate_kl",
    "evaluate_policy",
]
