"""A training whose numbers are no longer finite ends in words, with its last good checkpoint."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlkl.models import check_causal_lm
from rlkl.trainers import RaoBlackwellPPOTrainer
from rlkl.trainers.step import StepClock
from tests.trainers.stopping import SAVING, breaks


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
        ("policy", "too large", {}, "after step 3 what the model says of a few tokens is not fin"),
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
        ("too large", "after step 3 what the model says of a few tokens is not finite"),
    ],
)
def test_distillation_stops_before_its_next_checkpoint(make_distiller, when, says):
    trainer = make_distiller(**SAVING)
    assert says in breaks(trainer, trainer.model.transformer.wte.weight, when)


@pytest.mark.parametrize("method", ["ppo", "distill"])
def test_a_last_step_that_is_much_too_large_is_told_without_a_checkpoint_too(
    make_trainer, make_distiller, method
):
    make = make_trainer if method == "ppo" else make_distiller
    settings = {"num_ppo_epochs": 1} if method == "ppo" else {}
    trainer = make(max_steps=1, learning_rate=1e20, max_grad_norm=0.0, **settings)
    with pytest.raises(FloatingPointError, match="after step 1 what the model says of a few tok"):
        trainer.train()


def test_a_policy_that_is_not_finite_is_not_evaluated(make_trainer, prompts):
    trainer = make_trainer()
    trainer.model.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="after step 0 the policy's log π"):
        trainer.evaluate(prompts)


def test_a_kl_that_is_infinite_says_that_the_reference_forbids_something(make_trainer):
    trainer = make_trainer()
    responses = trainer.sample(
        {"prompt": ["it", "a plot"]}, trainer._generator("sampling"), StepClock()
    )
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
