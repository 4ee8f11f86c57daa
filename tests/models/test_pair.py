"""Pairs of models: shared weights are loaded once, and what cannot be compared is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from rlkl.models import ModelPair, load_pair

SHAPE = {"vocab_size": 33, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def save(tmp_path, tokenizer):
    """Saves a model with a tokenizer, and gives the folder."""

    def to_folder(model, name: str, own_tokenizer=tokenizer):
        model.save_pretrained(tmp_path / name)
        own_tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return to_folder


def adapter(folder, make_lm, base: str, name: str, seed: int, **config) -> str:
    """Folder of a LoRA adapter with random weights on a base that is in a folder."""
    model = make_lm()
    model.name_or_path = base
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **config
        ),
    )
    adapted.peft_config["default"].base_model_name_or_path = base
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key or (parameter.requires_grad and "bias" in key):
            torch.nn.init.normal_(parameter, generator=generator)
    adapted.save_pretrained(folder / name, save_embedding_layers=False)
    return str(folder / name)


@torch.no_grad()
def logits(side) -> torch.Tensor:
    with side.active() as model:
        return model(input_ids=torch.tensor([[0, 3, 5]])).logits


def test_an_adapter_and_its_base_share_one_module(save, make_lm, tmp_path):
    base = save(make_lm(), "base")
    pair = load_pair(adapter(tmp_path, make_lm, base, "adapter", 1), base)
    assert len(pair.modules()) == 1
    torch.testing.assert_close(logits(pair.ref), make_lm()(torch.tensor([[0, 3, 5]])).logits)
    assert not torch.allclose(logits(pair.policy), logits(pair.ref))
    swapped = pair.swapped()
    torch.testing.assert_close(logits(swapped.policy), logits(pair.ref))


def test_two_adapters_on_one_base_share_it_too(save, make_lm, tmp_path):
    base = save(make_lm(), "base")
    first = adapter(tmp_path, make_lm, base, "first", 1)
    second = adapter(tmp_path, make_lm, base, "second", 2)
    pair = load_pair(first, second)
    assert len(pair.modules()) == 1
    for side, folder in ((pair.policy, first), (pair.ref, second)):
        alone = PeftModel.from_pretrained(make_lm(), folder).eval()
        torch.testing.assert_close(logits(side), alone(torch.tensor([[0, 3, 5]])).logits)


def test_adapters_with_biases_of_their_base_have_a_base_each(save, make_lm, tmp_path):
    base = save(make_lm(), "base")
    first = adapter(tmp_path, make_lm, base, "first", 1, bias="all")
    second = adapter(tmp_path, make_lm, base, "second", 2, bias="lora_only")
    for ref in (base, second):
        pair = load_pair(first, ref)
        for side, folder in ((pair.policy, first), (pair.ref, ref)):
            alone = make_lm()
            if folder != base:
                alone = PeftModel.from_pretrained(alone, folder).eval()
            torch.testing.assert_close(logits(side), alone(torch.tensor([[0, 3, 5]])).logits)


def test_a_model_beside_itself_is_loaded_once(save, make_lm):
    folder = save(make_lm(), "m")
    assert len(load_pair(folder, folder).modules()) == 1
    assert len(load_pair(folder, save(make_lm(seed=1), "n")).modules()) == 2


def test_embedded_is_the_review_lm():
    pair = load_pair("embedded", "embedded")
    assert len(pair.tokenizer) == 4096


def test_rows_beyond_the_tokenizer_are_padding_and_left_out(save, make_lm):
    wide = make_lm()
    wide.resize_token_embeddings(40)
    with torch.no_grad():
        wide.get_input_embeddings().weight[33:] = 0.7
    pair = load_pair(save(wide, "wide"), save(make_lm(), "narrow"))
    assert pair.vocab_size == 33
    torch.testing.assert_close(logits(pair.policy)[..., :33], logits(pair.ref))
    assert "rows beyond are padding" in pair.notes[0]


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(save, make_lm):
    with pytest.raises(ValueError, match="a head has 30 rows for the 33 tokens"):
        load_pair(save(make_lm(vocab_size=30), "small"), save(make_lm(), "whole"))


def test_different_tokenizers_are_refused(save, make_lm, make_tokenizer):
    other = make_tokenizer(["red", "green", "blue"])
    with pytest.raises(ValueError, match="different tokenizers"):
        load_pair(save(make_lm(), "a"), save(make_lm(), "b", other))


def test_models_that_are_not_causal_are_refused(save, make_lm):
    good = save(make_lm(), "good")
    bert = BertConfig(**SHAPE, intermediate_size=32)
    masked = save(BertForMaskedLM(bert), "masked")
    with pytest.raises(ValueError, match=r"no causal language model.*BertForMaskedLM"):
        load_pair(masked, good)
    config = GPT2Config(vocab_size=33, n_embd=32, n_layer=1, n_head=2)
    classifier = save(GPT2ForSequenceClassification(config), "classifier")
    with pytest.raises(ValueError, match="no causal language model"):
        load_pair(good, classifier)


def test_a_causal_class_whose_attention_sees_the_future_is_refused(save, make_lm):
    """BertLMHeadModel is causal only with is_decoder=True, which nothing but running it shows."""
    bert = BertConfig(**SHAPE, intermediate_size=32, is_decoder=False)
    with pytest.raises(ValueError, match=r"changes what it says before|head"):
        load_pair(save(BertLMHeadModel(bert), "bert"), save(make_lm(), "good"))


def test_a_generation_config_with_filters_is_reported(save, make_lm):
    model = make_lm()
    model.generation_config.update(do_sample=True, top_p=0.9, top_k=20)
    pair = load_pair(save(model, "a"), save(make_lm(), "b"))
    assert "top_k=20, top_p=0.9" in pair.notes[0]
    assert "not applied" in pair.notes[0]


def test_an_adapter_without_its_base_is_refused(make_lm, tmp_path):
    lost = adapter(tmp_path, make_lm, "/nowhere/base", "lost", 1)
    with pytest.raises(ValueError, match=r"the base model of the adapter .* is not there"):
        load_pair(lost, "embedded")


def test_broken_adapters_and_folders_of_something_else_are_named(save, make_lm, tmp_path):
    base = save(make_lm(), "base")
    broken = adapter(tmp_path, make_lm, base, "broken", 1)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"broken cannot be read: .*header"):
        load_pair(broken, base)
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="broken cannot be read: Expecting property name"):
        load_pair(broken, base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no config\.json: name a folder"):
        load_pair(base, tmp_path / "empty")


def test_an_adapter_on_another_base_is_named(save, make_lm, tmp_path):
    made_on = adapter(tmp_path, make_lm, save(make_lm(n_embd=64), "wide"), "adapter", 1)
    with pytest.raises(ValueError, match=r"adapter cannot be read: Error.* in loading state_dict"):
        load_pair(made_on, str(tmp_path / "wide"))


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ("transformer.h.0.mlp.c_fc.weight", "hidden states that are no"),
        ("lm_head.weight", "logits"),
    ],
)
def test_weights_that_are_no_numbers_are_found(part, complaint, save, make_lm):
    model = make_lm(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(part)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=complaint):
        load_pair(save(make_lm(), "good"), save(model, "nan"))


def test_a_pair_in_memory_needs_a_reference_or_an_adapter(lm, tokenizer):
    with pytest.raises(ValueError, match="needs a ref_model"):
        ModelPair.of(lm, None, tokenizer)
