"""A run of RLOO or GRPO that was stopped and resumed is the run that was not."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from trl.trainer.utils import RepeatSampler

from rlkl.trainers.trl import RaoBlackwellGRPOTrainer
from rlkl.trainers.trl.order import OrderOfEpoch
from tests.trainers.stopping import StopAfter, lines, untimed
from tests.trainers.trl.cases import both_trainers

SPLIT = {"num_iterations": 2, "steps_per_generation": 2}
"""Four updates of each rollout."""


@both_trainers
@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({}, 6),  # an epoch's end
        ({}, 8),  # in the second epoch, whose prompts come in another order
        (SPLIT | {"logging_steps": 3}, 5),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2, "logging_steps": 2}, 3),
        ({"logging_strategy": "epoch"}, 6),
        ({"logging_strategy": "epoch"}, 7),
        ({"lora": "new"}, 8),
        ({"lora": "given"} | SPLIT, 3),
    ],
    ids=str,
)
def test_a_run_does_not_tell_where_it_was_stopped(
    make_trl_trainer, make_lm, lora, tmp_path, trainer_class, settings, stop
):
    """Weights to the last bit, and every record."""
    settings = {"max_steps": 9, "learning_rate": 1e-2} | settings
    adapter = settings.pop("lora", None)

    def make(folder):
        torch.manual_seed(7)  # of the adapter that is given
        own = {
            None: lambda: {},
            "new": lambda: {"peft_config": lora},
            "given": lambda: {"model": get_peft_model(make_lm(), lora)},
        }[adapter]()
        return make_trl_trainer(trainer_class, output_dir=str(tmp_path / folder), **settings, **own)

    whole = make("whole")
    whole.train()
    stopped = make("part")
    stopped.add_callback(StopAfter(stop))
    stopped.train()
    assert stopped.state.global_step == stop < whole.state.global_step
    torch.rand(3)  # whatever else draws in between
    resumed = make("part")
    resumed.train(resume_from_checkpoint=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    found, expected = (
        [untimed(record) for record in lines(tmp_path / name)] for name in ("part", "whole")
    )
    assert found == expected
    assert "kl/rb" in expected[0]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_each_epoch_is_trls(shuffle):
    shape = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "shuffle": shuffle}
    trls, ours = (RepeatSampler(range(11), seed=5, **shape) for _ in range(2))
    epochs = [list(trls) for _ in range(3)]
    assert (epochs[0] != epochs[1]) == shuffle
    order = OrderOfEpoch(ours)
    for epoch in (2, 0, 1, 1):
        order.set_epoch(epoch)
        assert list(order) == epochs[epoch]
    assert len(order) == len(epochs[0])


def test_a_rollout_is_kept_only_where_updates_of_it_are_to_come(make_trl_trainer):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = make_trl_trainer(RaoBlackwellGRPOTrainer, **SPLIT, **settings)
    trainer.train()
    kept = [
        torch.load(Path(trainer.args.output_dir) / f"checkpoint-{step}" / "rollout.pt")["rollout"]
        for step in (1, 2, 3, 4)
    ]
    assert [rollout is not None for rollout in kept] == [True, True, True, False]


@both_trainers
def test_a_second_training_begins_with_a_rollout_of_its_own(make_trl_trainer, trainer_class):
    trainer = make_trl_trainer(trainer_class, max_steps=2, **SPLIT)
    trainer.train()
    trainer.train()
    first, second = [log for log in trainer.state.log_history if "step_time" in log]
    assert "kl/rb" in first
    assert "kl/rb" not in second  # the second update of the same rollout


@both_trainers
def test_a_run_of_epochs_that_is_done_takes_no_more_steps(make_trl_trainer, trainer_class):
    """Half an epoch of six steps."""
    settings = {"max_steps": -1, "num_train_epochs": 0.5, "save_strategy": "steps", "save_steps": 1}
    make_trl_trainer(trainer_class, **settings).train()
    again = make_trl_trainer(trainer_class, **settings)
    assert again.train(resume_from_checkpoint=True).global_step == 3


@both_trainers
def test_what_cannot_be_gone_on_from_is_refused(make_trl_trainer, trainer_class):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trl_trainer(trainer_class, **settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds no optimiser .save_only_model"):
        make_trl_trainer(trainer_class, max_steps=3).train(resume_from_checkpoint=True)
