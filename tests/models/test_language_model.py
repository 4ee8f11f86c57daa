"""Hidden states are those before each token whatever the padding; what does not fit is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM, T5Config

from rlkl.models import (
    Critic,
    load_causal_lm,
    output_head,
    position_ids,
    response_hidden,
)

PROMPTS = [[3], [4, 5, 6, 7], [8, 9]]
RESPONSES = [[1, 2, 3], [4, 0], [5, 6, 7]]
SHORTEST_PAD = 5


@pytest.fixture
def neox():
    """A model of another family: rotary positions, untied head."""
    torch.manual_seed(0)
    shape = {"vocab_size": 33, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(
        **shape, intermediate_size=64, initializer_range=0.2, attn_implementation="eager"
    )
    return GPTNeoXForCausalLM(config).eval()


def padded(pad: int = 0):
    """PROMPTS left-padded and RESPONSES right-padded: ids, mask, and the response's mask."""
    ids, mask = torch.full((3, 4 + 3), pad), torch.zeros(3, 4 + 3, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids[i, 4 - len(prompt) : 4 + len(response)] = torch.tensor(prompt + response)
        mask[i, 4 - len(prompt) : 4 + len(response)] = True
    return ids, mask, mask[:, 4:]


@pytest.fixture(params=["gpt2", "neox"])
def model(request, lm, neox):
    return {"gpt2": lm, "neox": neox}[request.param]


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    positions = position_ids(mask)
    assert positions[mask.bool()].tolist() == [0, 1, 2, 0, 1, 2]
    assert (positions >= 0).all()


@torch.no_grad()
def test_hidden_states_are_those_before_each_token_with_and_without_padding(model):
    ids, mask, real = padded(SHORTEST_PAD)
    hidden = response_hidden(model, ids, mask, 3)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
        before = alone[len(prompt) - 1 : -1]
        torch.testing.assert_close(hidden[i][real[i]], before, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_log_probs_equal_those_of_a_plain_forward_on_the_unpadded_sequence(model):
    ids, mask, _ = padded()
    head = output_head(model)
    hidden = response_hidden(model, ids, mask, 3)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        plain = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        tokens = torch.tensor(response)[:, None]
        ours = logits[i, : len(response)].log_softmax(-1).gather(1, tokens)
        theirs = plain.log_softmax(-1).gather(1, tokens)
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(model):
    ids, mask, real = padded(0)
    other = torch.where(mask, ids, 17)
    ours, theirs = (response_hidden(model, x, mask, 3)[real] for x in (ids, other))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_without_positions_from_the_mask_left_padding_would_matter(lm):
    """The fault that `position_ids` repairs is real in GPT-2's absolute positions."""
    ids, mask, _ = padded()
    wrong = lm.base_model(ids, attention_mask=mask.long()).last_hidden_state[0, 3]
    right = response_hidden(lm, ids, mask, 3)[0, 0]
    assert (wrong - right).abs().max() > 0.1


def test_hidden_states_are_differentiable_in_the_model(lm):
    ids, mask, real = padded()
    response_hidden(lm, ids, mask, 3)[real].sum().backward()
    assert lm.transformer.h[0].attn.c_attn.weight.grad.abs().max() > 0


def test_the_head_is_the_models_own_not_a_copy(model):
    assert output_head(model).weight is model.get_output_embeddings().weight


def test_the_head_below_an_adapter_on_the_trunk_is_plain(lm):
    weight = lm.lm_head.weight
    adapted = get_peft_model(
        lm, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    assert output_head(adapted).weight is weight


def test_something_that_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match="a transformers causal LM is needed, not Linear"):
        output_head(torch.nn.Linear(2, 2))


def test_longrope_is_read_up_to_the_length_at_which_it_changes():
    """Beyond it a full pass rotates all keys anew; those in the sampler's cache stay."""
    shape = {"vocab_size": 33, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = Phi3ForCausalLM(
        Phi3Config(
            **shape,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            original_max_position_embeddings=8,
            rope_parameters=rope | {"rope_theta": 10000.0},
            pad_token_id=0,
        )
    ).eval()
    ids = torch.arange(10)[None]
    response_hidden(model, ids[:, :9], torch.ones(1, 9, dtype=torch.bool), 3)
    with pytest.raises(
        ValueError, match="to 9 tokens, and the model has 8 positions before its lo"
    ):
        response_hidden(model, ids, torch.ones(1, 10, dtype=torch.bool), 3)
    hidden = model.model(ids, use_cache=False).last_hidden_state
    first = model.model(ids[:, :8], use_cache=True)
    rest = model.model(ids[:, 8:], past_key_values=first.past_key_values).last_hidden_state
    assert (rest - hidden[:, 8:]).abs().max() > 1e-3  # why


# --- loading ------------------------------------------------------------------------------------


def test_a_saved_model_loads_with_its_weights_in_float32(lm, tmp_path):
    lm.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert loaded.dtype == torch.float32
    for ours, theirs in zip(lm.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def test_a_folder_without_weights_is_one_line(lm, tmp_path):
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights") as error:
        load_causal_lm(tmp_path)
    assert str(tmp_path) in one_line(error.value)


@pytest.mark.parametrize("missing", ["no/such/folder", "./none", "~/rlkl-no-such-model"])
def test_a_folder_that_is_not_there_is_one_line(missing):
    with pytest.raises(ValueError, match="no such model folder") as error:
        load_causal_lm(missing)
    assert missing.lstrip("~") in one_line(error.value)


def test_a_folder_of_the_home_directory_is_found(lm, tmp_path, monkeypatch):
    lm.save_pretrained(tmp_path / "policy")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(load_causal_lm("~/policy").lm_head.weight, lm.lm_head.weight)


def test_a_folder_without_config_is_refused(lm, tmp_path):
    lm.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises((ValueError, OSError)):
        load_causal_lm(tmp_path)


def test_weights_that_are_missing_or_of_another_shape_are_refused(make_lm, lm, tmp_path):
    """transformers fills them with random numbers and goes on."""
    whole = lm.state_dict()
    lm.save_pretrained(tmp_path, state_dict={k: v for k, v in whole.items() if ".h.1." not in k})
    with pytest.raises(ValueError, match=r"12 are missing or of another shape \(transformer\.h\.1"):
        load_causal_lm(tmp_path)
    make_lm(n_embd=16).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are missing or of another shape"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_broken_files_of_a_model_are_one_line_with_its_name(name, lm, tmp_path):
    lm.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(ValueError, match=r"cannot be read: .*; name a folder written by") as error:
        load_causal_lm(tmp_path)
    assert str(tmp_path) in one_line(error.value)


def test_a_file_and_an_adapter_are_no_folders_of_a_model(lm, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors is a file: name the folder"):
        load_causal_lm(tmp_path / "model.safetensors")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(lm, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter is an adapter: merge it into its base"):
        load_causal_lm(tmp_path / "adapter")


def test_a_classifier_is_no_causal_lm_in_one_line(tmp_path):
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="cannot be read: Unrecognized configuration") as error:
        load_causal_lm(tmp_path)
    assert len(one_line(error.value)) < 400


# --- the critic ---------------------------------------------------------------------------------


def test_a_new_critic_says_zero_everywhere(lm):
    ids, mask, _ = padded()
    values = Critic(32)(response_hidden(lm, ids, mask, 3), ids, mask)
    assert values.shape == (3, 3)
    assert not values.any()


def test_a_critic_on_its_own_trunk_does_not_read_the_policys(lm, make_lm):
    ids, mask, real = padded()
    critic = Critic(32, trunk=make_lm(seed=1))
    torch.nn.init.ones_(critic.head.weight)
    hidden = response_hidden(lm, ids, mask, 3)
    own = response_hidden(critic.trunk, ids, mask, 3)
    values = critic(hidden, ids, mask)
    torch.testing.assert_close(values[real], critic(torch.zeros_like(hidden), ids, mask)[real])
    torch.testing.assert_close(values[real], critic.head(own).squeeze(-1)[real])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("nope", "is not supported"), ("flex_attention", "does not support")],
)
def test_an_attention_that_is_not_there_is_refused_by_its_setting(name, complaint):
    with pytest.raises(ValueError, match=f"^attn_implementation is '{name}': .*{complaint}.*") as e:
        load_causal_lm(attn_implementation=name)
    assert str(e.value).endswith("; use eager or sdpa, or leave it out")
    with pytest.raises(ValueError, match="no such model folder"):
        load_causal_lm("/no/such", attn_implementation="sdpa")
