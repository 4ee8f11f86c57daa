"""Models that cannot be sampled as they are measured are found out by a few tokens."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlkl.models import check_causal_lm

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}


def model_of(kind: str, **settings: int) -> torch.nn.Module:
    config = AutoConfig.for_model(kind, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}),
        ("llama", SMALL | HEADS),
        ("mistral", SMALL | HEADS | {"sliding_window": 4}),
        ("gemma2", SMALL | HEADS | {"head_dim": 4, "sliding_window": 4}),
        ("llama4_text", SMALL | HEADS | {"num_local_experts": 2, "attention_chunk_size": 4}),
    ],
    ids=str,
)
def test_models_with_a_key_value_cache_pass(kind, settings):
    check_causal_lm(model_of(kind, **settings), "it")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", SMALL),
        ("rwkv", SMALL | {"attention_hidden_size": 16}),
        ("openai-gpt", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}),
    ],
    ids=str,
)
def test_models_whose_state_is_another_are_refused(kind, settings):
    with pytest.raises(ValueError, match=r"the policy \(.*\) says something else when its prompt"):
        check_causal_lm(model_of(kind, **settings), "the policy")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_with_a_decoder_is_refused_by_name(kind):
    sizes = {"vocab_size": 32, "d_model": 16, "num_layers": 1, "encoder_layers": 1}
    heads = {"num_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, **heads, decoder_layers=1)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(ValueError, match=rf"(?i){kind}.* is an encoder with a decoder, which"):
        check_causal_lm(model, "model")
