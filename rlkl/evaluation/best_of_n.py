"""The reward that sampling n responses and keeping the best would reach, without any training."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reward_models import RewardModel
from rlkl.kl import mean_and_stderr
from rlkl.rollout import sample_responses, score_responses


@dataclass(frozen=True)
class BestOfN:
    """Scores of n samples of the reference for each prompt."""

    scores: Tensor
    """[prompts, n]"""

    @property
    def n(self) -> int:
        """Samples per prompt."""
        return self.scores.shape[1]

    @property
    def reward(self) -> float:
        """Mean over prompts of the best score among the n samples."""
        return float(mean_and_stderr(self.scores.amax(1)).mean)

    @property
    def stderr(self) -> float:
        """Standard error of `reward`, over prompts."""
        return float(mean_and_stderr(self.scores.amax(1)).stderr)

    @property
    def mean_score(self) -> float:
        """Mean score of all the samples: the reference's own reward."""
        return float(self.scores.mean())

    @property
    def kl_bound(self) -> float:
        """Log n − (n − 1)/n nats per response: best-of-n is no further from the reference than
        that.

        Reference: Theoretical guarantees on the best-of-n alignment policy (Beirami et al., 2024),
        https://arxiv.org/abs/2401.01879, which proves it an upper bound.

        >>> round(BestOfN(torch.zeros(1, 64)).kl_bound, 3)
        3.175
        """
        return math.log(self.n) - (self.n - 1) / self.n


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
    """Samples n responses per prompt from the reference and scores them.

    `on_batch` is called with the number of responses sampled in each batch, for a progress bar.
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
    return BestOfN(score_responses(reward, responses).view(len(prompts), n))
