"""What every trainer here shares: texts as batches, logs that are files first, processes."""

import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import WandbCallback
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from rlkl.data import collate_prompts
from rlkl.models import enable_checkpointing
from rlkl.trainers.finite import check_finite
from rlkl.trainers.metrics import MetricsFile, average_steps
from rlkl.trainers.processes import check_processes, of_first
from rlkl.trainers.progress import closing_callbacks
from rlkl.trainers.resume import last_checkpoint, saved_state
from rlkl.trainers.run_config import RunArguments
from rlkl.trainers.tracking import WandbMirror


def check_rows(data: Any, which: str) -> None:
    """Refuses what has no numbered rows in columns (a stream, a list); None passes.

    Raises:
        ValueError: with what makes a Dataset of it.
    """
    if data is not None and not isinstance(data, Dataset):
        raise ValueError(
            f"{which} is of type {type(data).__name__}, and a datasets.Dataset is needed: make one "
            "by Dataset.from_list(list(rows))"
        )


def check_weights(models: dict[str, nn.Module], args: TrainingArguments) -> None:
    """Refuses weights that bf16 autocast cannot be mixed with, trained or not.

    Args:
        models: by the names of the trainer's arguments.
        args: the precision.

    Raises:
        ValueError: float64 or float16 weights; says whose, and what to do.
    """
    for name, model in models.items():
        dtypes = {p.dtype for p in model.parameters()} & {torch.float64, torch.float16}
        if args.bf16 and dtypes:
            raise ValueError(
                f"bf16 is on (the default where the hardware is fast at it) and {name} has weights "
                f"in {dtypes.pop()}: set bf16=False, or use float32 weights ({name}.float())"
            )


def named_sets(data: Dataset | dict[str, Dataset] | None) -> dict[str, Dataset]:
    """The evaluation sets that a trainer was given, by what to call them in a complaint."""
    if isinstance(data, dict):
        return {f"eval_dataset {name!r}": each for name, each in data.items()}
    return {} if data is None else {"eval_dataset": data}


_NOTED = "noted.json"
"""In a checkpoint: what its steps since the last log measured, which the next log averages."""


class TextTrainer(Trainer, ABC):
    """A Trainer whose batches are columns of texts, and whose every log is in ``metrics.jsonl``.

    W&B, where it is reported to, is a mirror of that: one run, which `tracked` opens. What a step
    measures goes to `noted`, under a name for each set of metrics that comes and goes together;
    the next log has their means.

    Of several processes (torchrun, accelerate launch) each has the whole model and its own batches;
    they read the same files, and the first one writes.

    Raises:
        ValueError: DeepSpeed or FSDP; fewer rows than a batch with ``dataloader_drop_last``;
            gradient checkpointing of a model whose layers cannot do it without dropout.
    """

    if_diverged: ClassVar[str] = "a lower learning_rate"
    """What to train with where numbers were no longer finite."""

    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RunArguments,
        train_dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        callbacks: list[TrainerCallback] | None,
    ) -> None:
        check_processes(args)
        # One of several GPUs: the Trainer would multiply the batch by their number.
        args._n_gpu = min(args.n_gpu, 1)
        self.tokenizer = tokenizer
        self.noted: dict[str, list[dict[str, float]]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_prompts,
            train_dataset=train_dataset,
            eval_dataset=cast(Any, eval_dataset),
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), MetricsFile()],
        )
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"the {len(train_dataset)} rows of train_dataset are fewer than "
                f"per_device_train_batch_size={args.per_device_train_batch_size}"
                + (f" of {args.world_size} processes" if args.world_size > 1 else "")
                + ", and with dataloader_drop_last nothing would be trained: choose a smaller "
                "batch, or dataloader_drop_last=False"
            )
        if args.activation_checkpointing:
            enable_checkpointing(self.model.eval(), "model")
        if self.pop_callback(WandbCallback) is not None:
            self.add_callback(WandbMirror)

    @abstractmethod
    def tracked(self, resume: bool = False) -> AbstractContextManager[None]:
        """The W&B run of this training; `train` opens it where none is open.

        Around more than `train` it takes evaluations before and after too. `resume` goes on in the
        run of the training that is resumed.
        """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trainer.train, in its W&B run.

        A checkpoint that has all steps is loaded, and that is all (the Trainer would take another).

        Args:
            resume_from_checkpoint: its folder, or True for the last whole one in ``output_dir``.
            kwargs: those of Trainer.train.

        Raises:
            ValueError: True, and ``output_dir`` holds no whole checkpoint; a checkpoint that holds
                the model alone; a model all of whose weights are frozen.
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
        if resume_from_checkpoint and not (Path(resume_from_checkpoint) / OPTIMIZER_NAME).is_file():
            raise ValueError(
                f"{resume_from_checkpoint} holds no optimiser (save_only_model): a run that went "
                "on from it would begin its schedule anew; begin a new run with its model"
            )
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError(
                "no weight of model is to be trained (requires_grad is False everywhere): "
                "PeftModel.from_pretrained(..., is_trainable=True) loads an adapter for training, "
                "model.requires_grad_(True) unfreezes a whole model"
            )
        with self.tracked(bool(resume_from_checkpoint)), closing_callbacks(self):
            return super().train(resume_from_checkpoint, **kwargs)

    def _is_done(self, state: TrainerState) -> bool:
        """Whether a checkpoint has all the steps that the settings ask for."""
        steps = self.args.max_steps
        if steps < 0:
            epoch = math.ceil(self.batches_per_epoch / self.args.gradient_accumulation_steps)
            steps = math.ceil(self.args.num_train_epochs * epoch)
        return state.global_step >= steps

    @property
    def batches_per_epoch(self) -> int:
        """Batches of all processes in a pass over the data; the last of them may be smaller."""
        batch = self.args.per_device_train_batch_size * self.args.world_size
        batches = len(cast(Dataset, self.train_dataset)) / batch
        return math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)

    def check_finite(self, name: str, values: Tensor) -> None:
        """Ends a training that has diverged, before what it has become reaches a checkpoint.

        Args:
            name: what the values are, for the complaint.
            values: any of them nan or infinite is one too many.

        Raises:
            FloatingPointError: says what is not finite, after which step, and what to do.
        """
        check_finite(name, values, self.state, Path(str(self.args.output_dir)), self.if_diverged)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer's, before each of its optimiser steps; refused where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # whose scaler skips such a step, and scales less from then on
            self.check_finite("the norm of the gradient", torch.as_tensor(norm))
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as `from_pretrained` reads it, if its trained weights are finite."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                self.check_finite(f"the weight {name}", weight)
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:  # a checkpoint
            at_epoch_end = self.accelerator.gradient_state.end_of_dataloader
            logged_next = at_epoch_end and self.args.logging_strategy == IntervalStrategy.EPOCH
            noted = {} if logged_next else self.noted
            (Path(str(output_dir)) / _NOTED).write_text(json.dumps(noted))

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

    def evaluate_each(self, sets: dict[str, Dataset], prefix: str) -> dict[str, float]:
        """`evaluate` of several data sets: ``<prefix>_<name of the set>_<metric>``."""
        metrics: dict[str, float] = {}
        for name, data in sets.items():
            metrics |= self.evaluate(cast(Any, data), metric_key_prefix=f"{prefix}_{name}")
        return metrics

    def report_evaluation(self, metrics: dict[str, float]) -> dict[str, float]:
        """Logs what `evaluate` measured, and tells the callbacks.

        Every process has measured all of it; what the first one found holds for all.
        """
        metrics = of_first(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
