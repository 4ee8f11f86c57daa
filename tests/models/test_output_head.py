"""The head as data gives the model's own logits, whatever the model does to them."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rlkl.kl import ModuleHead, OutputHead, fused_token_logp, head_logits
from rlkl.models import output_head, reference_model
from rlkl.models.language_model import trunk_of

SIZES = {
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def gemma():
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5, initializer_range=0.3)
    return Gemma2ForCausalLM(config)


def cohere():
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625))


def granite():
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=13.0, initializer_range=0.3))


def falcon():
    """Scales its logits by an option of another name: it is measured all the same."""
    config = FalconH1Config(
        **SIZES, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4
    )
    config.lm_head_multiplier = 0.25
    return FalconH1ForCausalLM(config)


def minicpm():
    """Scales the hidden states that its head reads, not the logits."""
    sizes = SIZES | {"num_key_value_heads": 2}
    return MiniCPM3ForCausalLM(MiniCPM3Config(**sizes, dim_model_base=48, initializer_range=0.3))


AROUND_HEAD = {
    gemma: (1.0, 1.5),
    cohere: (0.0625, None),
    granite: (1 / 13, None),
    falcon: (0.25, None),
    minicpm: (3.0, None),
}


def assert_same_logits(model):
    model.eval()
    hidden = trunk_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
    head, logits = output_head(model), model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(head_logits(head, hidden), logits, rtol=1e-5, atol=1e-5)
    stats = fused_token_logp(hidden[0], head, IDS[0])
    expected = logits[0].log_softmax(-1).gather(1, IDS[0, :, None])[:, 0]
    torch.testing.assert_close(stats.policy_logp, expected, rtol=1e-5, atol=1e-5)
    return head, stats, expected


@pytest.mark.parametrize("make", AROUND_HEAD, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")  # Falcon-H1 says which of its kernels are not installed
def test_scaled_and_capped_logits_are_the_models_own(make):
    torch.manual_seed(0)
    head, _, _ = assert_same_logits(make())
    assert isinstance(head, OutputHead)
    scale, softcap = AROUND_HEAD[make]
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == softcap


def test_a_plain_head_is_the_models_own_tensors(lm):
    head, _, _ = assert_same_logits(lm)
    assert head == OutputHead(lm.lm_head.weight)
    assert head.weight is lm.transformer.wte.weight


def test_measuring_a_head_draws_no_random_numbers(make_lm):
    lm = make_lm(resid_pdrop=0.5).train()
    before = torch.random.get_rng_state()
    output_head(lm)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def adapted(make_lm):
    config = LoraConfig(r=2, target_modules=["lm_head", "c_attn"], task_type="CAUSAL_LM")
    config.fan_in_fan_out = False
    model = get_peft_model(make_lm(tie_word_embeddings=False), config)
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_lora_on_the_head_has_the_gradients_of_the_model_itself(adapted):
    head, stats, expected = assert_same_logits(adapted)
    assert isinstance(head, OutputHead)
    ((a, b, _),) = head.adapters
    ours = torch.autograd.grad(stats.policy_logp.sum(), (a, b))
    theirs = torch.autograd.grad(expected.sum(), (a, b))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    with reference_model(adapted, None) as ref:
        assert output_head(ref).adapters == ()
    assert_same_logits(adapted)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_dropout_on_an_adapter_of_the_head_is_refused_while_training(make_lm):
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(make_lm(tie_word_embeddings=False), config).train()
    with pytest.raises(ValueError, match="active dropout"):
        output_head(model)
    assert isinstance(output_head(model.eval()), OutputHead)


def test_a_head_among_modules_to_save_is_trained_and_the_reference_keeps_its_own(make_lm):
    config = LoraConfig(
        r=2,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(make_lm(tie_word_embeddings=False), config)
    wrapper = model.base_model.model.lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
    head, _, _ = assert_same_logits(model)
    assert head.weight is wrapper.modules_to_save["default"].weight
    with reference_model(model, None) as ref:
        assert output_head(ref).weight is wrapper.original_module.weight


class Bottleneck(nn.Module):
    """A head of two layers."""

    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4), nn.Linear(4, vocab)

    def forward(self, hidden):
        return self.outer(torch.tanh(self.inner(hidden)))


def test_another_kind_of_head_is_used_in_chunks_and_said_once(make_lm, caplog):
    lm = make_lm(tie_word_embeddings=False)
    lm.set_output_embeddings(Bottleneck(lm.config.n_embd, lm.config.vocab_size))
    with caplog.at_level(logging.WARNING):
        head, stats, expected = assert_same_logits(lm)
        output_head(lm)
    assert isinstance(head, ModuleHead)
    assert caplog.text.count("Bottleneck") == 1
    parameters = list(head.module.parameters())
    ours = torch.autograd.grad(stats.policy_logp.sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), parameters)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_more_to_its_logits_is_refused(make_lm):
    lm = copy.deepcopy(make_lm())

    class Shifting(type(lm)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1.0
            return out

    lm.__class__ = Shifting
    with pytest.raises(ValueError, match="does more to its logits"):
        output_head(lm)


def test_dropout_and_autocast_around_the_model_do_not_change_what_is_measured(make_lm):
    lm = make_lm(resid_pdrop=0.5).train()
    lm.forward = torch.autocast("cpu", torch.bfloat16)(lm.forward)  # as accelerate prepares it
    assert output_head(lm) == OutputHead(lm.lm_head.weight)


def test_a_model_that_runs_its_decoder_without_its_trunk_has_its_own_logits():
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert_same_logits(OPTForCausalLM(OPTConfig(vocab_size=33, word_embed_proj_dim=8, **shape)))


def test_a_bias_is_not_scaled_with_the_hidden_states():
    torch.manual_seed(0)
    lm = minicpm()
    lm.lm_head = nn.Linear(16, 33)
    head, _, _ = assert_same_logits(lm)
    assert isinstance(head, OutputHead)


def test_a_factor_of_the_hidden_states_of_a_head_of_two_layers_is_refused():
    lm = minicpm()
    lm.set_output_embeddings(Bottleneck(16, 33))
    with pytest.raises(ValueError, match="scales its hidden states by 3 "):
        output_head(lm)


def test_a_model_that_does_more_to_its_hidden_states_is_refused():
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    lm = BertLMHeadModel(BertConfig(**sizes, is_decoder=True))
    with pytest.raises(ValueError, match="does more to its hidden states than scaling"):
        output_head(lm)
