"""A training whose numbers are no longer finite ends in words, with its last good checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from rlkl.models import check_causal_lm
from rlkl.trainers import RaoBlackwellPPOTrainer
from rlkl.trainers.step import StepClock
from rlkl.trainers.text_trainer import TextTrainer

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


class Breaks(TrainerCallback):
    """Makes one number of a weight, or of its gradient, nan in the third step."""

    def __init__(self, weight: nn.Parameter, when: str) -> None:
        self.weight, self.when = weight, when

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.when == "gradient":
            self.weight.register_hook(lambda gradient: gradient * torch.nan)
        elif state.global_step == 2 and self.when == "before":
            self.weight.data.view(-1)[0] = torch.nan

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.when == "after":
            self.weight.data.view(-1)[0] = torch.nan


def checkpoints(trainer: TextTrainer) -> dict[str, bool]:
    """By name, whether all weights are finite."""
    return {
        folder.name: all(
            bool(weight.isfinite().all())
            for file in folder.glob("*.safetensors")
            for weight in load_file(file).values()
        )
        for folder in Path(str(trainer.args.output_dir)).glob("checkpoint-*")
    }


def breaks(trainer: TextTrainer, weight: nn.Parameter, when: str) -> str:
    """Trains until it breaks: what it says."""
    trainer.add_callback(Breaks(weight, when))
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert checkpoints(trainer) == {"checkpoint-1": True, "checkpoint-2": True}
    assert "training has diverged. Begin again with a lower learning_rate" in str(error.value)
    assert f"{trainer.args.output_dir}/checkpoint-2, the last checkpoint" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("weight", "when", "settings", "says"),
    [
        (
            "policy",
            "before",
            {},
            "after step 2 the policy's log π(y_t|h_t) is not finite",
        ),
        ("critic", "before", {}, "after step 2 the critic's V(h_t) is not finite"),
        ("policy", "gradient", {}, "after step 2 the norm of the policy's gradient is not finite"),
        ("policy", "gradient", {"max_grad_norm": 0.0}, "the norm of the policy's gradient"),
        ("policy", "gradient", {"num_ppo_epochs": 1}, "after step 2 the norm of the gradient is"),
        ("critic", "gradient", {}, "after step 2 the norm of the critic's gradient is not finite"),
        ("policy", "after", {}, "after step 3 the weight lm_head.weight is not finite (1 of"),
        ("critic", "after", {}, "after step 3 the critic's weight head.bias is not finite (nan)"),
    ],
)
def test_ppo_stops_before_its_next_checkpoint(make_trainer, weight, when, settings, says):
    trainer = make_trainer(RaoBlackwellPPOTrainer, **(SAVING | settings))
    trainer.model.lm_head.weight = nn.Parameter(trainer.model.lm_head.weight.detach().clone())
    weights = {"policy": trainer.model.lm_head.weight, "critic": trainer.critic.head.bias}
    message = breaks(trainer, weights[weight], when)
    assert says in message
    assert "or a larger kl_coef" in message


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("before", "after step 2 the loss is not finite (nan)"),
        ("gradient", "after step 2 the norm of the gradient is not finite (nan)"),
        ("after", "after step 3 the weight transformer.wte.weight is not finite (1 of"),
    ],
)
def test_distillation_stops_before_its_next_checkpoint(make_distiller, when, says):
    trainer = make_distiller(**SAVING)
    assert says in breaks(trainer, trainer.model.transformer.wte.weight, when)


def test_a_policy_that_is_not_finite_is_not_evaluated(make_trainer, prompts):
    trainer = make_trainer()
    trainer.model.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="after step 0 the policy's log π"):
        trainer.evaluate(prompts)


def test_a_kl_that_is_infinite_says_that_the_reference_forbids_something(make_trainer):
    trainer = make_trainer()
    responses = trainer.sample(["it", "a plot"], trainer._generator("sampling"), StepClock())
    rollout = trainer.measure(responses, StepClock())
    ref_logp = rollout.tokens.ref_logp.clone()
    ref_logp[0, 0] = -torch.inf
    rollout = replace(rollout, tokens=replace(rollout.tokens, ref_logp=ref_logp))
    with pytest.raises(ValueError, match="KL by k1 is infinite: the reference gives no prob"):
        trainer.advantages(rollout, {})


def test_a_model_that_is_not_finite_is_refused_at_the_start(make_trainer, make_lm):
    model = make_lm()
    model.transformer.wte.weight.data[3:] = torch.nan
    with pytest.raises(ValueError, match="model gives hidden states that are not finite"):
        make_trainer(model=model)
    with pytest.raises(ValueError, match="it gives hidden states that are not finite"):
        check_causal_lm(model, "it")
