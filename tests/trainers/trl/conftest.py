"""RLOO and GRPO of the tiny model on the lexicon reward."""

from collections.abc import Callable
from typing import Any

import pytest

from reward_models import LexiconReward
from tests.trainers.trl.cases import CONFIGS

ARGUMENTS = (
    "model",
    "reward_funcs",
    "ref_model",
    "peft_config",
    "judges",
    "eval_dataset",
    "train_dataset",
    "processing_class",
    "callbacks",
)


@pytest.fixture
def make_trl_trainer(quick_run, make_lm, tokenizer, prompts) -> Callable[..., Any]:
    """Builds a trainer; keywords are the trainer's arguments first, TRL's settings otherwise."""

    def make(trainer_class: type, **changes: Any) -> Any:
        own: dict[str, Any] = {
            "model": make_lm(),
            "reward_funcs": LexiconReward(),
            "train_dataset": prompts,
            "processing_class": tokenizer,
        }
        own |= {name: changes.pop(name) for name in ARGUMENTS if name in changes}
        settings = {name: value for name, value in quick_run.items() if name != "response_length"}
        settings |= {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "logging_steps": 1,
            "beta": 0.1,
            "activation_checkpointing": False,
        }
        return trainer_class(args=CONFIGS[trainer_class](**(settings | changes)), **own)

    return make
