"""The reward that sampling n responses and keeping the best would reach, without any training."""

import math
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class BestOfNPoint:
    """Best-of-n at one n: reward and other scores, means over prompts with standard errors."""

    n: int
    kl_bound: float
    """log n − (n − 1)/n nats: its KL from the reference is at most that."""
    reward: float
    reward_se: float
    others: dict[str, tuple[float, float]]


def best_of_n_curve(
    scores: Tensor, others: Mapping[str, Tensor] | None = None, ns: Sequence[int] | None = None
) -> list[BestOfNPoint]:
    """Best-of-n for several n from the same N ≥ n samples of each prompt, without bias.

    With the N scores in rising order, the i-th is the best of n drawn without replacement with
    probability C(i − 1, n − 1) / C(N, n): the mean over all subsets of n samples.

    Args:
        scores: [P, N] rewards.
        others: other scores [P, N] of the same samples, read at the one with the best reward.
        ns: which n; None takes 1, 2, 4, … up to N.

    Raises:
        ValueError: an n that is not in 1 … N.

    Example:
        >>> [round(point.reward, 3) for point in best_of_n_curve(torch.tensor([[0.0, 1.0]] * 2))]
        [0.5, 1.0]
    """
    samples = scores.shape[1]
    if ns is None:
        ns = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    order = scores.double().argsort(1)
    points = []
    for n in ns:
        if not 1 <= n <= samples:
            raise ValueError(f"n is {n}; with {samples} samples it must be 1 to {samples}")
        rank = torch.arange(1, samples + 1, dtype=torch.float64)
        log_weight = _log_choose(rank - 1, n - 1) - _log_choose(rank[-1], n)
        weight = torch.where(rank >= n, log_weight, -torch.inf).exp()

        def mean(values: Tensor, weight: Tensor = weight) -> tuple[float, float]:
            result = mean_and_stderr((values.double().gather(1, order) * weight).sum(1))
            return float(result.mean), float(result.stderr)

        bound = math.log(n) - (n - 1) / n
        named = {name: mean(other) for name, other in (others or {}).items()}
        points.append(BestOfNPoint(n, bound, *mean(scores), named))
    return points


def _log_choose(n: Tensor, k: int) -> Tensor:
    """Log C(n, k), for n ≥ k."""
    n = n.clamp(min=k)
    return (n + 1).lgamma() - math.lgamma(k + 1) - (n - k + 1).lgamma()


def best_of_n(
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    reward: RewardModel,
    n: int,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> BestOfN:
    """Samples n responses per prompt from the reference and scores them; see `sample_scores`."""
    scores = sample_scores(
        reference,
        tokenizer,
        prompts,
        {"reward": reward},
        n,
        max_new_tokens,
        temperature=temperature,
        max_prompt_length=max_prompt_length,
        seed=seed,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    return BestOfN(scores["reward"])


def sample_scores(
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    rewards: Mapping[str, RewardModel],
    n: int,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Scores [P, n] of n samples of the reference for each prompt, by every reward model.

    `max_prompt_length` is that of `sample_responses`: longer prompts lose their beginning.
    `on_batch` is called with the number of responses sampled in each batch, for a progress bar.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    responses = sample_responses(
        reference,
        tokenizer,
        repeated,
        max_new_tokens,
        temperature=temperature,
        max_prompt_length=max_prompt_length,
        generator=torch.Generator(device=next(reference.parameters()).device).manual_seed(seed),
        batch_size=batch_size,
        on_batch=on_batch,
    )
    return {
        name: score_responses(reward, responses).view(len(prompts), n)
        for name, reward in rewards.items()
    }
