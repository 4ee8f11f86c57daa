"""The reserved cache holds what transformers' own would, and is used only where it may be."""

import pytest
import torch
from transformers import DynamicCache, GPT2Config, MistralConfig

from rlkl.rollout.cache import ReservedLayer, reserved_cache


def test_hidden_states_equal_those_with_the_dynamic_cache(lm):
    ids = torch.randint(0, lm.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for cache in (DynamicCache(config=lm.config), reserved_cache(lm.config, 9)):
        parts = [
            lm(input_ids=step, past_key_values=cache, use_cache=True).logits
            for step in ids.split([4, 1, 1, 3], 1)
        ]
        results.append(torch.cat(parts, 1))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_positions_beyond_the_reserved_ones_are_refused():
    layer, states = ReservedLayer(2), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="capacity is 2, position 3"):
        layer.update(states, states)


def test_a_model_with_a_sliding_window_keeps_its_own_cache():
    plain = reserved_cache(GPT2Config(n_layer=2), 8)
    window = reserved_cache(MistralConfig(num_hidden_layers=2, sliding_window=4), 8)
    assert [type(layer) for layer in plain.layers] == [ReservedLayer] * 2
    assert not any(isinstance(layer, ReservedLayer) for layer in window.layers)
