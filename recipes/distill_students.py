"""The students of distill_reviews.py: smaller than their teacher, and no beginners.

A student begins with the teacher's embeddings in its own width, and learns the corpus by
cross-entropy. A warm-up that was stopped, or killed, goes on from its last checkpoint.
"""

import copy
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
)

from rlkl.data import collate_prompts
from rlkl.kl import fused_logp_loss
from rlkl.models import output_head, response_hidden
from rlkl.rollout import given_responses
from rlkl.trainers import DistillConfig, RichProgress, StopOnInterrupt
from rlkl.trainers.progress import closing_callbacks
from rlkl.trainers.resume import last_checkpoint
from rlkl.trainers.run_config import RunArguments

SAVE_STEPS = 100
"""Warm-up steps between checkpoints."""


@dataclass
class StudentArguments:
    """What a student is, and how it is warmed up."""

    student_width: int = field(default=96, metadata={"help": "n_embd of the student, a GPT-2."})
    student_layers: int = field(default=4, metadata={"help": "n_layer of the student."})
    warm_up_steps: int = field(
        default=256, metadata={"help": "Cross-entropy steps; 0: nothing but the embeddings."}
    )
    warm_up_batch_size: int = field(default=32, metadata={"help": "Texts a step."})
    warm_up_learning_rate: float = field(default=3e-3, metadata={"help": "Peak; falls to 0."})


def check_shape(task: StudentArguments, teacher: PreTrainedModel) -> None:
    """Refuses a student that cannot be built.

    Raises:
        ValueError: names the setting.
    """
    heads = teacher.config.n_head
    if task.student_width < 1 or task.student_width % heads:
        raise ValueError(
            f"student_width is {task.student_width}; give a multiple of the teacher's {heads} heads"
        )
    for name, least in (("student_layers", 1), ("warm_up_steps", 0), ("warm_up_batch_size", 1)):
        if getattr(task, name) < least:
            raise ValueError(f"{name} is {getattr(task, name)}; give at least {least}")


def warmed_up(
    folder: Path,
    seed: int,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    task: StudentArguments,
    args: DistillConfig,
    console: Console,
) -> PreTrainedModel:
    """The student of a seed, from its folder where it is there.

    Raises:
        KeyboardInterrupt: its warm-up was stopped.
    """
    if not folder.is_dir():
        student = new_student(teacher, seed, task)
        share = student.num_parameters() / teacher.num_parameters()
        console.print(
            f"student: {student.num_parameters():,} parameters, {share:.0%} of the teacher"
        )
        work = folder.with_name(f"{folder.name}.warm-up")
        if task.warm_up_steps > 0:
            warm_up(student, work, seed, tokenizer, data, task, args, console)
        student.save_pretrained(work / "student")
        os.replace(work / "student", folder)
        shutil.rmtree(work)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def new_student(teacher: PreTrainedModel, seed: int, task: StudentArguments) -> PreTrainedModel:
    """A GPT-2 of the student's shape: the teacher's embeddings, the rest at random."""
    config = copy.deepcopy(teacher.config)
    config.n_embd, config.n_layer = task.student_width, task.student_layers
    torch.manual_seed(seed)
    student = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    begin_with_embeddings(student, teacher)
    return student


@torch.no_grad()
def begin_with_embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """The teacher's embeddings E in the student's width: E V, V the first right singular vectors.

    Cross-entropy alone would spend most of the warm-up on finding them.
    """
    embeddings = cast(Tensor, teacher.get_input_embeddings().weight)
    directions = torch.linalg.svd(embeddings.float(), full_matrices=False).Vh
    own = cast(Tensor, student.get_input_embeddings().weight)
    width = min(own.shape[1], len(directions))
    own[:, :width] = embeddings @ directions[:width].T


def warm_up(
    student: PreTrainedModel,
    folder: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    task: StudentArguments,
    args: DistillConfig,
    console: Console,
) -> None:
    """Teaches a student the corpus by cross-entropy, with checkpoints in a folder of its own.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    steps = task.warm_up_steps
    optimizer = torch.optim.AdamW(student.parameters(), lr=task.warm_up_learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps)
    )
    texts = steps * task.warm_up_batch_size
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(texts / len(data))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(passes)])
    trainer = CrossEntropyTrainer(
        student,
        RunArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=task.warm_up_batch_size,
            train_sampling_strategy="sequential",  # the order is drawn above
            seed=seed,
            bf16=args.bf16,
            logging_steps=10,
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collate_prompts,
        train_dataset=data.select(order[:texts].tolist()),
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler),
        callbacks=[
            RichProgress(console, title=f"warm-up, seed {seed}", describe=cross_entropy),
            StopOnInterrupt(),
        ],
    )
    trainer.response_length = args.response_length
    trainer.remove_callback(PrinterCallback)
    with closing_callbacks(trainer):
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if trainer.state.global_step < steps:
        raise KeyboardInterrupt


def cross_entropy(logs: dict[str, float]) -> str | None:
    """What a warm-up step measured."""
    return f"cross-entropy {logs['loss']:.3f} nats per token" if "loss" in logs else None


class CrossEntropyTrainer(Trainer):
    """Minimises −log student(y_t), mean over the tokens of given completions or texts."""

    model: PreTrainedModel
    response_length: int

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Texts -> responses -> hidden states -> loss."""
        responses = given_responses(
            cast(PreTrainedTokenizerBase, self.processing_class),
            inputs.get("prompt"),
            inputs["completion"] if "prompt" in inputs else inputs["text"],
            self.response_length,
        )
        ids, mask = responses.input_ids, responses.mask
        with self.accelerator.autocast():
            hidden = response_hidden(self.model, ids, responses.attention_mask, mask.shape[1])
        loss, _ = fused_logp_loss(
            lambda stats: -stats.policy_logp.sum() / mask.sum(),
            hidden[mask],
            output_head(self.model),
            responses.tokens[mask],
        )
        return loss
