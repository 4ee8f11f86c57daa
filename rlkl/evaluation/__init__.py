"""How good a policy is: score, judges and KL on held-out prompts, and best-of-n of the
reference.
"""

from rlkl.evaluation.best_of_n import BestOfN, best_of_n
from rlkl.evaluation.policy import Evaluation, evaluate_policy

__all__ = ["BestOfN", "Evaluation", "best_of_n", "evaluate_policy"]
