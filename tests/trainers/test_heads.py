"""Heads that are more than a matrix train like any other: LoRA on the head, soft-capped logits."""

import pytest
import torch
from peft import LoraConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlkl.kl import reverse_kl
from rlkl.trainers import RaoBlackwellPPOTrainer
from rlkl.trainers.step import StepClock


def capped_lm(vocab_size: int) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 16)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Gemma2Config(
        vocab_size=vocab_size,
        **sizes,
        **layers,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def model_kl(trainer, responses) -> torch.Tensor:
    """D_t by the two models' own forwards, [N]."""
    ids, length = responses.input_ids, responses.tokens.shape[1]
    inputs = {"input_ids": ids, "attention_mask": responses.attention_mask.long()}
    inputs["position_ids"] = (responses.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        policy = trainer.model(**inputs).logits[:, -length - 1 : -1]
        if trainer.ref_model is None:
            with trainer.model.disable_adapter():
                ref = trainer.model(**inputs).logits[:, -length - 1 : -1]
        else:
            ref = trainer.ref_model(**inputs).logits[:, -length - 1 : -1]
    return reverse_kl(policy, ref)[responses.mask]


@pytest.mark.parametrize("head", ["soft-capped", "LoRA"])
def test_a_step_trains_and_measures_the_kl_of_the_models_themselves(
    make_trainer, make_lm, tokenizer, steps, head
):
    if head == "LoRA":
        lora = LoraConfig(target_modules=["lm_head"], r=2)
        changes = {"model": make_lm(tie_word_embeddings=False), "peft_config": lora}
    else:
        changes = {"model": capped_lm(len(tokenizer))}
    trainer = make_trainer(RaoBlackwellPPOTrainer, **changes, max_steps=2, learning_rate=0.05)
    trainer.train()
    first, second = steps(trainer)
    assert first["kl/rb"] == first["kl/k1"] == first["val/first_ratio_error"] == 0
    assert second["kl/rb"] > 1e-4
    clock = StepClock()
    prompts = ["the film", "I found this plot"] * 2
    responses = trainer.sample({"prompt": prompts}, torch.Generator().manual_seed(0), clock)
    measured = trainer.measure(responses, clock).tokens.kl[responses.mask]
    torch.testing.assert_close(
        measured, model_kl(trainer, responses).to(measured.dtype), rtol=1e-3, atol=1e-5
    )
    if head == "LoRA":
        moved = [p for n, p in trainer.model.named_parameters() if "lm_head.lora_B" in n]
        assert all(float(p.detach().abs().max()) > 0 for p in moved)
        assert moved
