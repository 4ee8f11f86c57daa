"""A policy on held-out prompts: reward, judges, KL from the reference, each with its standard
error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from reward_models import RewardModel
from rlkl.evaluation.eval_mode import eval_mode
from rlkl.kl import mean_and_stderr
from rlkl.models import check_reference
from rlkl.rollout import (
    Rollout,
    collect_rollout,
    sample_responses,
    summarise,
    token_statistics,
)
from rlkl.rollout.summary import prompt_groups


@dataclass(frozen=True)
class Evaluation:
    """What a policy did on a list of prompts, one response each."""

    metrics: dict[str, float]
    """Means and standard errors (``*_se``) by the names of `rlkl.trainers.VOCABULARY`."""
    positive: tuple[float, float]
    """Share of responses with a score above 0, and its standard error, clustered by prompt."""
    rollout: Rollout
    """The responses themselves."""


@torch.no_grad()
def evaluate_policy(
    policy: nn.Module,
    ref_model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    reward: RewardModel,
    max_new_tokens: int,
    *,
    judges: Mapping[str, RewardModel] | None = None,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Samples one response to each prompt and measures it, in the precision of the weights.

    One response to each entry of the list; those to a prompt that it repeats are alike, and the
    standard errors are those of a mean over the different prompts. The seed fixes the draws: two
    policies are compared on the same noise.

    Args:
        policy: the policy, in eval mode while this runs.
        ref_model: the reference, likewise; None means the policy with its PEFT adapter off.
        tokenizer: the policy's.
        prompts: held-out prompts.
        reward: the reward model.
        max_new_tokens: length limit; the KL is that of the process cut there.
        judges: other reward models, by name.
        temperature: sampling temperature, part of both distributions.
        max_prompt_length: longest prompt in tokens; longer ones lose their beginning.
        seed: of the draws.
        batch_size: responses per pass.
        on_batch: called with the number of responses sampled in each batch.

    Raises:
        ValueError: a reference that is not what it looks like; see `check_reference`.
    """
    check_reference(policy, ref_model)
    with eval_mode(policy, ref_model):
        responses = sample_responses(
            policy,
            tokenizer,
            prompts,
            max_new_tokens,
            temperature=temperature,
            generator=torch.Generator(device=next(policy.parameters()).device).manual_seed(seed),
            batch_size=batch_size,
            max_prompt_length=max_prompt_length,
            on_batch=on_batch,
        )
        tokens = token_statistics(
            policy, ref_model, responses, temperature=temperature, batch_size=batch_size
        )
    rollout = collect_rollout(responses, reward, tokens, judges)
    mean, stderr = mean_and_stderr((rollout.scores > 0).float(), prompt_groups(responses))
    return Evaluation(summarise(rollout), (float(mean), float(stderr)), rollout)
