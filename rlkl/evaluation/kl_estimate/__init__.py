"""The KL between two language models on sampled or given responses, with error bars.

Read in this order: `estimate` (the loop and `estimate_kl`), `draws` and `completions` (where
responses come from), `measure` (numbers per token), `accumulate` (running sums), `units` (what is
independent, standard errors), `report` (the records), `page` (as HTML).
"""

from rlkl.evaluation.kl_estimate.completions import ReplayedResponses
from rlkl.evaluation.kl_estimate.draws import SampledResponses
from rlkl.evaluation.kl_estimate.estimate import KLEstimation, Settings, estimate_kl
from rlkl.evaluation.kl_estimate.report import Estimate, KLReport
from rlkl.evaluation.kl_estimate.units import Estimand

__all__ = [
    "Estimand",
    "Estimate",
    "KLEstimation",
    "KLReport",
    "ReplayedResponses",
    "SampledResponses",
    "Settings",
    "estimate_kl",
]
