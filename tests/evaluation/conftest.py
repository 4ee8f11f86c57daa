"""A policy and a reference of four tokens, whose KL can be had by enumeration."""

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast


@pytest.fixture
def colours(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer(["red", "green", "blue"])


@pytest.fixture
def nearby(make_lm: Callable[..., GPT2LMHeadModel]) -> Callable[[int, float], GPT2LMHeadModel]:
    """Makes a model not far from the policy, so that every weight has a variance."""

    def make(seed: int, distance: float) -> GPT2LMHeadModel:
        model = make_lm(vocab_size=4, seed=3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += distance * torch.randn(weight.shape, generator=generator)
        return model

    return make


@pytest.fixture
def policy(make_lm: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return make_lm(vocab_size=4, seed=3)


@pytest.fixture
def ref(nearby: Callable[[int, float], GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return nearby(0, 0.05)


@torch.no_grad()
def exact_kl(policy, ref, prompt_ids: list[int], steps: int) -> float:
    """D_KL of the first `steps` tokens by recursion over prefixes: D(h) + Σ_v π(v|h) KL(h v)."""
    p, q = (
        model(torch.tensor([prompt_ids])).logits[0, -1].double().log_softmax(-1)
        for model in (policy, ref)
    )
    total = float((p.exp() * (p - q)).sum())
    if steps > 1:
        for v in range(1, len(p)):  # 0 is the end of text
            total += float(p[v].exp()) * exact_kl(policy, ref, [*prompt_ids, v], steps - 1)
    return total


@pytest.fixture
def enumerated_kl(colours: PreTrainedTokenizerFast) -> Callable[..., float]:
    """Mean over prompts of the KL of the first `steps` tokens."""

    def mean(policy, ref, prompts: list[str], steps: int) -> float:
        rows = [[0, *colours(prompt)["input_ids"]] for prompt in prompts]
        return sum(exact_kl(policy, ref, row, steps) for row in rows) / len(rows)

    return mean
