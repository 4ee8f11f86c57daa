"""What a training takes for itself, the screen and Ctrl-C, is given back however it ends."""

import signal
from io import StringIO

import pytest
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlkl.trainers import RichProgress, StopOnInterrupt


class RaisesAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("out of memory")


class InterruptsAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("raising", [True, False])
def test_ctrl_c_and_screen_are_given_back_whether_training_raises_or_not(make_trainer, raising):
    def own_handler(number, frame):
        pass

    progress = RichProgress(Console(file=StringIO(), force_terminal=True))
    trainer = make_trainer(
        callbacks=[progress, StopOnInterrupt(), *([RaisesAtStep()] if raising else [])]
    )
    before = signal.signal(signal.SIGINT, own_handler)
    try:
        if raising:
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train()
        else:
            trainer.train()
        assert signal.getsignal(signal.SIGINT) is own_handler
        assert not progress.console._live_stack
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_training_after_the_step_in_work_with_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[InterruptsAtStep(), StopOnInterrupt()], max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 1
    assert (tmp_path / "run" / "checkpoint-1" / "critic.safetensors").is_file()


def test_the_bar_moves_with_a_log_that_measured_nothing_and_keeps_what_was_measured(tmp_path):
    """An update of an older rollout."""
    console = Console(file=StringIO(), force_terminal=True)
    progress = RichProgress(console, describe=lambda logs: logs.get("measured"))
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=3)
    progress.on_train_begin(args, state, control)
    for state.global_step, logs in ((1, {"measured": "reward 1"}), (2, {"loss": 0.5})):
        progress.on_log(args, state, control, logs)
    (task,) = progress.progress.tasks
    assert (task.completed, task.fields["measured"]) == (2, "reward 1")
    progress.close()
