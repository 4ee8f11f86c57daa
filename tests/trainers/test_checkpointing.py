"""Gradient checkpointing: the same numbers from less memory, in trainers without dropout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from rlkl.models import enable_checkpointing, recomputing
from rlkl.trainers import PPOTrainer, RaoBlackwellPPOTrainer

DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)


def trained(trainer: Any) -> dict[str, Tensor]:
    trainer.train()
    return trainer.model.state_dict()


def saved(model: torch.nn.Module, run: Callable[..., Any], *given: Any) -> int:
    """Numbers that a pass keeps for its backward pass, but for weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(*given)
    return sum(kept.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"separate_value_model": True},
        {"lora": True, "micro_batch_size": 2},
        {"bf16": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
    ids=str,
)
def test_ppo_learns_the_same_weights_with_it(make_trainer, make_lm, lora, steps, changes):
    changes = dict(changes)
    changes |= {"peft_config": lora} if changes.pop("lora", False) else {}
    weights = []
    for recomputed in (False, True):
        trainer = make_trainer(
            RaoBlackwellPPOTrainer,
            model=make_lm(**DROPOUT),
            activation_checkpointing=recomputed,
            **changes,
        )
        weights.append(trained(trainer))
        assert steps(trainer)[0]["val/first_ratio_error"] == 0
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name


def test_ppos_passes_keep_less(make_trainer, make_lm):
    kept = []
    for recomputed in (False, True):
        model = make_lm(n_layer=6)
        trainer = make_trainer(PPOTrainer, model=model, activation_checkpointing=recomputed)
        responses = trainer.sample({"prompt": ["the film is"] * 8}, torch.Generator(), _no_clock)
        kept.append(saved(model, trainer.policy_pass, responses))
        assert not any(module.training for module in trainer.model.modules())
    assert kept[1] < 0.25 * kept[0]


def test_a_students_passes_keep_less_and_teach_the_same(make_distiller, make_lm):
    kept, weights = [], []
    for recomputed in (False, True):
        student = make_lm(seed=1, n_layer=6, **DROPOUT)
        trainer = make_distiller(model=student, activation_checkpointing=recomputed)
        inputs = {name: trainer.train_dataset[name][:6] for name in ("prompt", "completion")}
        responses = trainer.given(inputs)
        kept.append(saved(student, trainer.hidden_states, responses))
        weights.append(trained(trainer))
    assert kept[1] < 0.25 * kept[0]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name


def test_the_old_name_is_the_same_setting(make_trainer):
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        trainer = make_trainer(gradient_checkpointing=True)
    assert trainer.args.activation_checkpointing
    with recomputing(trainer.model):
        assert sum(module.training for module in trainer.model.modules()) == 2  # its layers


def test_layers_that_drop_out_by_themselves_are_refused():
    shape = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    with pytest.raises(ValueError, match="dropout fields to 0"):
        enable_checkpointing(OPTForCausalLM(OPTConfig(dropout=0.5, **shape)).eval(), "model")
    enable_checkpointing(OPTForCausalLM(OPTConfig(dropout=0.0, **shape)).eval(), "model")


def test_layers_that_cannot_are_refused(make_lm: Callable[..., GPT2LMHeadModel], monkeypatch):
    model = make_lm()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="does not support"):
        enable_checkpointing(model, "model")


def _no_clock(part: str) -> Any:
    return torch.no_grad()
