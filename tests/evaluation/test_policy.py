"""A policy on held-out prompts, against its reference."""

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlkl.evaluation import evaluate_policy


def no_reward(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    return torch.zeros(len(prompts))


def test_a_reference_in_train_mode_is_measured_without_dropout(make_lm, tokenizer):
    policy, ref = make_lm(), make_lm().train()
    metrics = evaluate_policy(policy, ref, tokenizer, ["the film", "it was"], no_reward, 4).metrics
    assert metrics["kl/rb"] == 0
    assert ref.training
    assert not policy.training


def test_the_base_with_the_adapter_in_it_is_refused_as_reference(make_lm, tokenizer):
    """Its KL would be 0, whatever the adapter does."""
    base = make_lm()
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora)
    with pytest.raises(ValueError, match="same adapter layers"):
        evaluate_policy(policy, base, tokenizer, ["the film"], no_reward, 4)
