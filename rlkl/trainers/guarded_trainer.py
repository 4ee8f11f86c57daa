"""What every trainer here adds to transformers' loop: exact resumes, an end where it diverges."""

import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.integrations import WandbCallback
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from rlkl.models import few_tokens
from rlkl.trainers.finite import check_finite
from rlkl.trainers.metrics import MetricsFile, NoLogOfPartEpochs, average_steps
from rlkl.trainers.progress import closing_callbacks
from rlkl.trainers.resume import last_checkpoint, saved_state
from rlkl.trainers.tracking import WandbMirror

_NOTED = "noted.json"
"""In a checkpoint: what its steps since the last log measured, which the next log averages."""


class GuardedTrainer(Trainer, ABC):
    """A Trainer that goes on exactly where it was stopped, and stops when it has diverged.

    Every log is in ``metrics.jsonl``; W&B, where it is reported to, is a mirror of that: one run,
    which `tracked` opens. What a step measures goes to `noted`, under a name for each set of
    metrics that comes and goes together; the next log has their means.

    Args:
        callbacks: transformers callbacks beside its own.
        of_the_trainer: the other arguments of the Trainer that it is put before.
    """

    if_diverged: ClassVar[str] = "a lower learning_rate"
    """What to train with where numbers were no longer finite."""

    model: PreTrainedModel | PeftModel

    def __init__(
        self, *, callbacks: list[TrainerCallback] | None = None, **of_the_trainer: Any
    ) -> None:
        self.noted: dict[str, list[dict[str, float]]] = defaultdict(list)
        own = [NoLogOfPartEpochs(), MetricsFile()]
        try:
            super().__init__(callbacks=[*(callbacks or []), *own], **of_the_trainer)
        except RuntimeError as error:
            if "Callback requires" not in str(error):
                raise
            raise ValueError(f"report_to: {error} Or leave it out") from error
        if self.pop_callback(WandbCallback) is not None:
            self.add_callback(WandbMirror)

    @abstractmethod
    def tracked(self, resume: bool = False) -> AbstractContextManager[None]:
        """The W&B run of this training; `train` opens it where none is open.

        Around more than `train` it takes evaluations before and after too. `resume` goes on in the
        run of the training that is resumed.
        """

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """Batches of a pass over the data; the last of them may be smaller."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trainer.train, in its W&B run.

        A checkpoint that has all steps is loaded, and that is all (the Trainer would take another).

        Args:
            resume_from_checkpoint: its folder, or True for the last whole one in ``output_dir``.
            kwargs: those of Trainer.train.

        Raises:
            ValueError: True, and ``output_dir`` holds no whole checkpoint; a checkpoint that holds
                the model alone; a model all of whose weights are frozen.
            FloatingPointError: training has diverged.
        """
        if resume_from_checkpoint is True:
            folder = Path(str(self.args.output_dir))
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"{folder} holds no whole checkpoint to go on from")
        self.noted.clear()  # of a training before this one
        if resume_from_checkpoint and self._is_done(state := saved_state(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)
            self.state = state
            return TrainOutput(state.global_step, 0.0, {})
        if resume_from_checkpoint:
            self.check_checkpoint(resume_from_checkpoint)
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError(
                "no weight of model is to be trained (requires_grad is False everywhere): "
                "PeftModel.from_pretrained(..., is_trainable=True) loads an adapter for training, "
                "model.requires_grad_(True) unfreezes a whole model"
            )
        with self.tracked(bool(resume_from_checkpoint)), closing_callbacks(self):
            output = super().train(resume_from_checkpoint, **kwargs)
            self.check_model()
            return output

    def check_optimiser(self) -> None:
        """Refuses before any work an optimiser that `train` could not make, or its schedule.

        Raises:
            ValueError: settings that they cannot be made with.
            ImportError: a library that is not installed.
        """
        self.create_optimizer_and_scheduler(num_training_steps=1)
        self.optimizer = self.lr_scheduler = None  # `train` makes its own

    def check_checkpoint(self, checkpoint: str) -> None:
        """Refuses one that `train` could not go on from.

        Raises:
            ValueError: it holds the model alone, and lacks steps.
        """
        whole = (Path(checkpoint) / OPTIMIZER_NAME).is_file()
        if not whole and not self._is_done(saved_state(checkpoint)):
            raise ValueError(
                f"{checkpoint} holds no optimiser (save_only_model): a run that went on from it "
                "would begin its schedule anew; begin a new run with its model"
            )

    def _is_done(self, state: TrainerState) -> bool:
        """Whether a checkpoint has all the steps that the settings ask for."""
        steps = self.args.max_steps
        if steps < 0:
            epoch = math.ceil(self.batches_per_epoch / self.args.gradient_accumulation_steps)
            steps = math.ceil(self.args.num_train_epochs * epoch)
        return state.global_step >= steps

    def check_finite(self, name: str, values: Tensor) -> None:
        """Ends a training that has diverged, before what it has become reaches a checkpoint.

        Args:
            name: what the values are, for the complaint.
            values: any of them nan or infinite is one too many.

        Raises:
            FloatingPointError: says what is not finite, after which step, and what to do.
        """
        check_finite(name, values, self.state, Path(str(self.args.output_dir)), self.if_diverged)

    def check_model(self) -> None:
        """`check_finite` of the trained weights, and of what the model makes of a few tokens."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                self.check_finite(f"the weight {name}", weight)
        model = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            self.check_finite("what the model says of a few tokens", few_tokens(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer's, before each of its optimiser steps; refused where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # whose scaler skips such a step, and scales less from then on
            self.check_finite("the norm of the gradient", torch.as_tensor(norm))
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as `from_pretrained` reads it, if `check_model` lets it pass."""
        self.check_model()
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:  # a checkpoint
            noted = {} if self._logs_next() else self.noted
            (Path(str(output_dir)) / _NOTED).write_text(json.dumps(noted))

    def _logs_next(self) -> bool:
        """Whether the end of an epoch has come, and its log follows the checkpoint at hand."""
        at_epoch_end = self.accelerator.gradient_state.end_of_dataloader
        return at_epoch_end and self.args.logging_strategy == IntervalStrategy.EPOCH

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / _NOTED
        if file.is_file():
            self.noted.update(json.loads(file.read_text()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the steps since the last log measured."""
        if "loss" in logs or "train_loss" in logs:
            for steps in self.noted.values():
                logs = {**logs, **average_steps(steps)}
            self.noted.clear()
        super().log(logs, start_time)
