"""From prompts to a measured rollout: sampling, scoring, exact token statistics, summary."""

from rlkl.rollout.collect import (
    PolicyPass,
    collect_rollout,
    policy_pass,
    token_statistics,
)
from rlkl.rollout.divergence import (
    DivergenceRecord,
    divergence_statistics,
    summarise_divergences,
)
from rlkl.rollout.given import given_responses
from rlkl.rollout.records import Responses, Rollout, TokenRecord, scatter_tokens
from rlkl.rollout.sampling import encode_prompts, response_texts, sample_responses
from rlkl.rollout.scoring import (
    ColumnReward,
    FunctionReward,
    SumOfRewards,
    score_responses,
    score_texts,
)
from rlkl.rollout.summary import summarise

__all__ = [
    "ColumnReward",
    "DivergenceRecord",
    "FunctionReward",
    "PolicyPass",
    "Responses",
    "Rollout",
    "SumOfRewards",
    "TokenRecord",
    "collect_rollout",
    "divergence_statistics",
    "encode_prompts",
    "given_responses",
    "policy_pass",
    "response_texts",
    "sample_responses",
    "scatter_tokens",
    "score_responses",
    "score_texts",
    "summarise",
    "summarise_divergences",
    "token_statistics",
]
