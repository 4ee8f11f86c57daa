"""RLOO and GRPO whose numbers are no longer finite end in words, with the last good checkpoint."""

import pytest
from torch import nn

from tests.trainers.stopping import SAVING, breaks, checkpoints
from tests.trainers.trl.cases import both_trainers


@both_trainers
@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("before", "after step 2 the policy's largest logit is not finite (8 of 8 values)"),
        ("gradient", "after step 2 the norm of the gradient is not finite (nan)"),
        ("after", "after step 3 the weight lm_head.weight is not finite (1 of"),
        ("too large", "after step 3 what the model says of a few tokens is not finite"),
    ],
)
def test_training_stops_before_its_next_checkpoint(make_trl_trainer, trainer_class, when, says):
    trainer = make_trl_trainer(trainer_class, **SAVING)
    trainer.model.lm_head.weight = nn.Parameter(trainer.model.lm_head.weight.detach().clone())
    message = breaks(trainer, trainer.model.lm_head.weight, when)
    assert says in message
    assert "or a larger beta" in message


@both_trainers
def test_a_step_that_is_much_too_large_leaves_no_checkpoint(make_trl_trainer, trainer_class):
    """torch refused to sample from what it had become, and it had been saved."""
    trainer = make_trl_trainer(trainer_class, learning_rate=1e20, max_grad_norm=0.0, **SAVING)
    with pytest.raises(FloatingPointError, match="after step 1 what the model says"):
        trainer.train()
    assert checkpoints(trainer) == {}
