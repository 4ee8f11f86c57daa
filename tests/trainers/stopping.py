"""Runs that are stopped or diverge, and what they leave behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from rlkl.trainers.guarded_trainer import GuardedTrainer


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def untimed(record: dict) -> dict:
    """What does not depend on when it was measured."""
    timed = ("time/", "train_", "step_time", "eps")
    return {k: v for k, v in record.items() if not k.startswith(timed)}


class StopAfter(TrainerCallback):
    """Ends training after a step with a checkpoint, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


class Breaks(TrainerCallback):
    """Makes one number of a weight, or of its gradient, nan in the third step; or all too large."""

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
        elif state.global_step == 3 and self.when == "too large":
            self.weight.data.fill_(3e38)  # finite


def checkpoints(trainer: GuardedTrainer) -> dict[str, bool]:
    """By name, whether all weights are finite."""
    return {
        folder.name: all(
            bool(weight.isfinite().all())
            for file in folder.glob("*.safetensors")
            for weight in load_file(file).values()
        )
        for folder in Path(str(trainer.args.output_dir)).glob("checkpoint-*")
    }


def breaks(trainer: GuardedTrainer, weight: nn.Parameter, when: str) -> str:
    """Trains until it breaks: what it says."""
    trainer.add_callback(Breaks(weight, when))
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert checkpoints(trainer) == {"checkpoint-1": True, "checkpoint-2": True}
    assert "training has diverged. Begin again with a lower learning_rate" in str(error.value)
    assert f"{trainer.args.output_dir}/checkpoint-2, the last checkpoint" in str(error.value)
    return str(error.value)
