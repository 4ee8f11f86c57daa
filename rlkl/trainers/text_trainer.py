"""What PPO and distillation share: texts as batches, several processes."""

import math
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from rlkl.data import collate_prompts
from rlkl.models import enable_checkpointing
from rlkl.models.language_model import causal_lm
from rlkl.trainers.guarded_trainer import GuardedTrainer
from rlkl.trainers.processes import check_processes, of_first
from rlkl.trainers.run_config import RunArguments


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
    """Refuses weights that bf16 autocast cannot be mixed with, trained or not, and those that would
    not be trained.

    Args:
        models: by the names of the trainer's arguments; ``model`` is the one that is trained.
        args: the precision.

    Raises:
        ValueError: float64 or float16 weights; 4-bit ones below an adapter on a CPU; says whose,
            and what to do.
    """
    trained = causal_lm(models["model"])
    if getattr(trained, "is_loaded_in_4bit", False) and trained.device.type == "cpu":
        raise ValueError(
            "model has 4-bit weights on a CPU, where bitsandbytes repacks them in the first pass "
            "without gradient, and no gradient passes them from then on: load it in 8 bits, or "
            "train on a GPU"
        )
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


class TextTrainer(GuardedTrainer):
    """A Trainer whose batches are columns of texts.

    Of several processes (torchrun, accelerate launch) each has the whole model and its own batches;
    they read the same files, and the first one writes.

    Raises:
        ValueError: DeepSpeed or FSDP; fewer rows than a batch with ``dataloader_drop_last``;
            gradient checkpointing of a model whose layers cannot do it without dropout.
    """

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
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_prompts,
            train_dataset=train_dataset,
            eval_dataset=cast(Any, eval_dataset),
            processing_class=tokenizer,
            callbacks=callbacks,
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

    @property
    def batches_per_epoch(self) -> int:
        """Batches of all processes in a pass over the data; the last of them may be smaller."""
        batch = self.args.per_device_train_batch_size * self.args.world_size
        batches = len(cast(Dataset, self.train_dataset)) / batch
        return math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)

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
