"""The reference: what it is without and with an adapter, and what does not move it."""

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    VBLoRAConfig,
    get_peft_model,
)

from rlkl.models import (
    ModelPair,
    check_reference,
    check_same_tokenizer,
    frozen_copy,
    load_tokenizer,
    reference_model,
)

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def adapted(lm):
    """A policy whose adapter already does something."""
    config = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", lora_dropout=0.5
    )
    model = get_peft_model(lm, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_the_reference_of_an_adapter_is_the_base_model(make_lm, adapted):
    base = make_lm()(IDS).logits
    assert (adapted(IDS).logits - base).abs().max() > 0.1
    with reference_model(adapted, None) as ref:
        assert torch.equal(ref(IDS).logits, base)
    assert (adapted(IDS).logits - base).abs().max() > 0.1


def test_the_reference_of_an_adapter_is_no_second_copy_of_the_weights(adapted):
    own = {p.data_ptr() for p in adapted.parameters()}
    with reference_model(adapted, None) as ref:
        assert {p.data_ptr() for p in ref.parameters()} <= own


def test_the_adapter_stays_trainable_after_the_reference_was_read(adapted):
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    with reference_model(adapted, None):
        pass
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trainable
    assert all("lora" in name for name in trainable)


def test_a_given_reference_goes_before_the_adapter(adapted, make_lm):
    other = make_lm(seed=1)
    with reference_model(adapted, other) as ref:
        assert ref is other


def test_a_policy_without_adapter_needs_a_reference(lm):
    with pytest.raises(ValueError, match=r"needs a ref_model: frozen_copy\(policy\)"):
        reference_model(lm, None).__enter__()


@pytest.mark.parametrize("swapped", [False, True])
def test_the_base_with_the_adapter_in_it_is_no_reference(adapted, tokenizer, swapped):
    """A trained adapter is frozen when it is loaded: what is shared need not be trainable."""
    adapted.requires_grad_(False)
    pair = (adapted, adapted.get_base_model())
    with pytest.raises(ValueError, match="pass None, which is the policy with its adapter off"):
        ModelPair.of(*(pair[::-1] if swapped else pair), tokenizer)


def test_biases_of_the_base_that_an_adapter_has_trained_stay_on_when_it_is_off(lm, make_lm):
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    policy = get_peft_model(lm, lora)
    with pytest.raises(ValueError, match="stay on when it is off"):
        check_reference(policy, None)
    check_reference(policy, make_lm())


@pytest.mark.parametrize("unfrozen", ["", "base_model.model.transformer.ln_f", "c_attn.base_layer"])
def test_weights_of_the_base_that_are_trained_too_are_named(adapted, make_lm, unfrozen):
    """They stay on when the adapter is off: the reference would move along in silence."""
    for name, module in adapted.named_modules():
        if name.endswith(unfrozen):
            module.requires_grad_(True)
    with pytest.raises(ValueError, match=r"requires_grad of .*\.weight and \d+ more"):
        check_reference(adapted, None)
    check_reference(adapted, make_lm())
    check_reference(adapted.requires_grad_(False), None)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f", "wte"]),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[1]),
        VBLoRAConfig(  # vectors that all layers share, and that stand in none
            target_modules=["c_attn"], fan_in_fan_out=True, num_vectors=4, vector_length=8, topk=1
        ),
        IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_what_an_adapter_brings_may_be_trained(lm, config):
    policy = get_peft_model(lm, config)
    assert any(p.requires_grad for p in policy.parameters())
    check_reference(policy, None)
    with reference_model(policy, None):  # switches adapters off and on
        pass
    check_reference(policy, None)


@torch.no_grad()
@pytest.mark.parametrize("saved", ["lm_head", "wte", "ln_f"])
def test_layers_that_are_trained_whole_go_off_with_their_adapter(make_lm, saved):
    base = make_lm(tie_word_embeddings=False)
    before = base(IDS).logits
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=[saved])
    policy = get_peft_model(base, lora).eval()
    for parameter in policy.parameters():
        parameter.add_(float(parameter.requires_grad))
    assert (policy(IDS).logits - before).abs().max() > 0.1
    with reference_model(policy, None) as ref:
        assert torch.equal(ref(IDS).logits, before)


def test_the_policy_itself_none_and_another_model_are_references(adapted, make_lm):
    for ref_model in (adapted, None, make_lm()):
        check_reference(adapted, ref_model)


@torch.no_grad()
def test_a_frozen_copy_does_not_follow_the_policy(lm):
    copy = frozen_copy(lm)
    before = copy(IDS).logits
    for parameter in lm.parameters():
        parameter.add_(1)
    assert torch.equal(copy(IDS).logits, before)
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in lm.parameters())


@torch.no_grad()
def test_a_frozen_copy_is_of_the_weights_in_memory_whatever_the_config_names(lm, make_lm, tmp_path):
    make_lm(seed=1).save_pretrained(tmp_path)
    lm.config._name_or_path = str(tmp_path)
    assert torch.equal(frozen_copy(lm)(IDS).logits, lm(IDS).logits)


@torch.no_grad()
def test_a_frozen_copy_has_no_dropout(make_lm):
    policy = make_lm(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    clean = policy(IDS).logits
    assert torch.equal(frozen_copy(policy.train())(IDS).logits, clean)


# --- tokenizers ---------------------------------------------------------------------------------


def test_equal_tokenizers_pass(make_tokenizer):
    check_same_tokenizer(make_tokenizer(), make_tokenizer())


def test_the_first_token_that_differs_is_named_with_both_ids(make_tokenizer):
    ours, theirs = (
        make_tokenizer(["red", "green", "blue"]),
        make_tokenizer(["red", "blue", "green"]),
    )
    with pytest.raises(ValueError, match=r"'(green|blue)' is \d in one and \d in the other"):
        check_same_tokenizer(ours, theirs)


def test_a_token_that_only_one_has_is_named_with_the_sizes(make_tokenizer):
    ours, theirs = make_tokenizer(["red"]), make_tokenizer(["red", "green"])
    with pytest.raises(ValueError, match=r"2 and 3 tokens; 'green' is None in one and 2"):
        check_same_tokenizer(ours, theirs)


def test_a_tokenizer_without_padding_pads_on_the_left_with_end_of_text(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.padding_side == "left"
    assert loaded.pad_token_id == loaded.eos_token_id


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(make_lm, tokenizer, tmp_path):
    """transformers makes an empty one of a GPT-2's config.json."""
    make_lm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: save that of the model there"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for broken in ("{", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match="cannot be read: no tokenizer, or a broken one: "):
            load_tokenizer(tmp_path)
