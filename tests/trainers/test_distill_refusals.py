"""What DistillTrainer refuses before any work, in its own words."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from rlkl.trainers import DistillConfig, DistillTrainer


@pytest.fixture
def build(quick_run, make_lm, tokenizer):
    """Builds a trainer of one pair; keywords are those of DistillTrainer."""

    def make(**changes):
        return DistillTrainer(
            **{
                "model": make_lm(seed=1),
                "teacher_model": make_lm(seed=0),
                "args": DistillConfig(**quick_run),
                "train_dataset": Dataset.from_dict({"prompt": ["the film"], "completion": ["is"]}),
                "processing_class": tokenizer,
            }
            | changes
        )

    return make


def test_a_second_adapter_is_refused(build, make_lm, lora):
    student = get_peft_model(make_lm(seed=1), lora)
    with pytest.raises(ValueError, match="has an adapter already: leave peft_config out"):
        build(model=student, peft_config=lora)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_data_without_rows_is_refused(which, build):
    empty = Dataset.from_dict({"prompt": [], "completion": []})
    with pytest.raises(ValueError, match=f"{which} has no rows: give it at least one"):
        build(**{which: empty})


@pytest.mark.parametrize("which", ["model", "teacher_model"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_that_autocast_cannot_be_mixed_with_are_refused(
    which, dtype, build, make_lm, quick_run
):
    args = DistillConfig(**(quick_run | {"bf16": True}))
    with pytest.raises(ValueError, match=rf" {which} has weights in {dtype}: set bf16=False"):
        build(args=args, **{which: make_lm(seed=2).to(dtype)})


def test_a_teacher_whose_weights_are_unfrozen_later_is_seen_before_they_are_trained(build, make_lm):
    student, teacher = make_lm(seed=1), make_lm(seed=0)
    student.transformer.wpe.requires_grad_(False)
    teacher.transformer.wpe = student.transformer.wpe
    trainer = build(model=student, teacher_model=teacher)
    student.transformer.wpe.requires_grad_(True)
    with pytest.raises(ValueError, match="teacher_model share the weights that are trained"):
        trainer.train()


def test_fewer_rows_than_a_batch_are_refused_where_only_whole_batches_count(build, quick_run):
    """Nothing was trained, and a warning said so."""
    args = DistillConfig(**quick_run, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="the 1 rows of train_dataset are fewer than"):
        build(args=args)
