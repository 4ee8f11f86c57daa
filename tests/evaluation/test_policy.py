"""A policy on held-out prompts, against its reference."""

from collections.abc import Sequence

import torch

from rlkl.evaluation import evaluate_policy


def no_reward(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    return torch.zeros(len(prompts))


def test_a_reference_in_train_mode_is_measured_without_dropout(make_lm, tokenizer):
    policy, ref = make_lm(), make_lm().train()
    metrics = evaluate_policy(policy, ref, tokenizer, ["the film", "it was"], no_reward, 4).metrics
    assert metrics["kl/rb"] == 0
    assert ref.training
    assert not policy.training
