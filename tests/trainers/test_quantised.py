"""Weights of 8 and 4 bits below an adapter: trained, saved and refused as they can be.

Their sums on a CPU are bitsandbytes' own; speed and memory are for GPUs.
"""

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.quantizers import quantizer_bnb_8bit

from rlkl.models import check_causal_lm, load_causal_lm, output_head
from rlkl.trainers import DistillTrainer, RaoBlackwellPPOTrainer

# what bitsandbytes says of its products
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
EIGHT, FOUR = BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)


def adapter() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")


def test_the_layers_are_quantised_and_the_head_is_not(folders):
    model = load_causal_lm(folders / "policy", quantization_config=EIGHT)
    assert isinstance(model.transformer.h[0].attn.c_attn, Linear8bitLt)
    head = output_head(model)
    assert head.weight.dtype == torch.float32
    whole = load_causal_lm(folders / "policy")
    assert torch.equal(head.weight, output_head(whole).weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found, expected = (m(ids).logits for m in (model, whole))
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


def test_rounding_to_8_bits_is_no_recurrence_nor_a_look_ahead():
    """Hidden states of the embedded model differ a little where they are read one by one."""
    check_causal_lm(load_causal_lm(quantization_config=EIGHT), "model")


def test_an_adapter_on_8_bits_is_trained_from_a_kl_of_exactly_zero(folders, make_trainer, steps):
    model = load_causal_lm(folders / "policy", quantization_config=EIGHT)
    layer = model.transformer.h[0].attn.c_attn
    before = layer.weight.data.clone()
    trainer = make_trainer(RaoBlackwellPPOTrainer, model=model, peft_config=adapter())
    trainer.train()
    first, second = steps(trainer)
    assert first["kl/rb"] == 0
    assert first["grad_norm"] > 0
    assert second["kl/rb"] > 0
    assert torch.equal(layer.weight.data, before)


def test_a_teacher_of_8_bits_teaches(folders, make_distiller, steps):
    teacher = load_causal_lm(folders / "policy", quantization_config=EIGHT)
    student = load_causal_lm(folders / "policy")
    trainer = make_distiller(model=student, teacher_model=teacher)
    trainer.train()
    first, *_ = steps(trainer)
    assert 0 < first["divergence/fkl"] < 1e-2  # the two differ by the rounding


@pytest.mark.parametrize("trainer_class", [RaoBlackwellPPOTrainer, DistillTrainer])
def test_4_bits_on_a_cpu_are_refused_since_no_gradient_would_pass_them(
    folders, make_trainer, make_distiller, trainer_class
):
    model = load_causal_lm(folders / "policy", quantization_config=FOUR)
    make = make_distiller if trainer_class is DistillTrainer else make_trainer
    with pytest.raises(ValueError, match=r"4-bit weights on a CPU.* load it in 8 bits"):
        make(model=model, peft_config=adapter())


def test_a_value_model_cannot_be_a_copy_of_quantised_weights(folders, make_trainer):
    model = load_causal_lm(folders / "policy", quantization_config=EIGHT)
    with pytest.raises(ValueError, match=r"separate_value_model .* quantised ones cannot be"):
        make_trainer(model=model, peft_config=adapter(), separate_value_model=True)


def test_a_package_that_is_missing_is_named_in_one_line(folders, monkeypatch):
    monkeypatch.setattr(quantizer_bnb_8bit, "is_accelerate_available", lambda *_: False)
    with pytest.raises(ValueError, match="or leave the quantisation out") as refused:
        load_causal_lm(folders / "policy", quantization_config=EIGHT)
    assert "\n" not in str(refused.value)
