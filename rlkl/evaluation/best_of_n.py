"""The reward that sampling n responses and keeping the best would reach, without any training."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reward_models import RewardModel
from rlkl.kl import mean_and_stderr
from rlkl.rollout import sample_responses, score_responses


class BestOfN(NamedTuple):
    """Reward of best-of-n over prompts, with the bound on its KL."""

    n: int
    reward: float
    """Mean over prompts of the best score among n samples of the reference."""
    stderr: float
    """Standard error over prompts."""
    kl_bound: float
    """log n − (n − 1)/n nats per response: no best-of-n is further from the reference than that."""
    mean_score: float
    """Mean score of all the samples: the reference's own reward."""
    scores: Tensor
    """[prompts, n]"""


def best_of_n(
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    reward: RewardModel,
    n: int,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> BestOfN:
    """Samples n responses per prompt from the reference and averages each prompt's best score.

    The KL bound log n − (n − 1)/n is that of Beirami et al. (2024), https://arxiv.org/abs/2401.01879.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    responses = sample_responses(
        reference,
        tokenizer,
        repeated,
        max_new_tokens,
        temperature=temperature,
        generator=torch.Generator(device=next(reference.parameters()).device).manual_seed(seed),
        batch_size=batch_size,
        on_batch=on_batch,
    )
    scores = score_responses(reward, responses).view(len(prompts), n)
    mean, stderr = mean_and_stderr(scores.amax(1))
    return BestOfN(
        n=n,
        reward=float(mean),
        stderr=float(stderr),
        kl_bound=math.log(n) - (n - 1) / n,
        mean_score=float(scores.mean()),
        scores=scores,
    )
