"""A policy on held-out prompts, against its reference."""

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlkl.evaluation import best_of_n, estimate_kl, evaluate_policy


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


@pytest.mark.parametrize("prompt", ["the film was so", "the film " * 60 + "was so"])
def test_prompts_are_cut_to_their_last_tokens_as_in_training(make_lm, tokenizer, prompt):
    """Whether they would fit or not."""

    def read(prompt: str, **cut: int) -> list[object]:
        policy, ref, seen = make_lm(), make_lm(seed=1), []

        def reward(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
            seen.append(list(responses))
            return torch.zeros(len(responses))

        prompts = [prompt] * 4
        kl = evaluate_policy(policy, ref, tokenizer, prompts, reward, 4, **cut).metrics["kl/rb"]
        best_of_n(ref, tokenizer, prompts, reward, 2, 4, **cut)
        estimate = estimate_kl(
            policy, ref, tokenizer, prompts, num_samples=4, max_new_tokens=4, **cut
        )
        return [kl, seen, estimate.best.nats_per_response]

    assert read(prompt, max_prompt_length=2) == read("was so", max_prompt_length=2)


def test_prompts_that_repeat_are_one_each_in_every_standard_error(make_lm, tokenizer):
    """Equal scores of a prompt's responses say no more than one of them."""

    def of_the_prompt(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        return torch.tensor([1.0 if prompt == "the film" else -1.0 for prompt in prompts])

    def errors(times: int) -> tuple[float, float]:
        prompts = ["the film", "it was", "a plot"] * times
        found = evaluate_policy(make_lm(), make_lm(), tokenizer, prompts, of_the_prompt, 4)
        assert found.positive[0] == pytest.approx(1 / 3)
        return found.positive[1], found.metrics["objective/scores_se"] / 2  # -1, 1 and 0, 1

    assert errors(8) == pytest.approx(errors(1))
    assert errors(8)[0] == pytest.approx(errors(8)[1])
