"""A trainer of the tiny model on the lexicon reward, and rollouts that hold every response."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from reward_models import LexiconReward
from rlkl.rollout import Rollout
from rlkl.trainers import PPOConfig, PPOTrainer

PROMPTS = ["the film is", "a plot", "I found this film and", "it", "so the end was", "acting"] * 2


@pytest.fixture(autouse=True, scope="package")
def _quick_collections() -> None:
    """The Trainer collects garbage at every start: among all imported modules, most of a test."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


@pytest.fixture
def lora() -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", lora_dropout=0.5
    )


@pytest.fixture
def quick_run(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that is over at once, says nothing and saves nothing."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 2,
        "response_length": 6,
        "learning_rate": 3e-3,
        "seed": 1,
    }


@pytest.fixture
def make_config(quick_run: dict[str, Any]) -> Callable[..., PPOConfig]:
    """Settings of PPO: 8 responses a step."""

    def make(**changes: Any) -> PPOConfig:
        settings = {"per_device_train_batch_size": 8, "num_ppo_epochs": 2, "kl_coef": 0.1}
        return PPOConfig(**(quick_run | settings | changes))

    return make


@pytest.fixture
def make_trainer(make_config, make_lm, tokenizer, prompts) -> Callable[..., PPOTrainer]:
    """Builds a trainer; keywords are those of PPOTrainer first, of PPOConfig otherwise."""
    arguments = ("ref_model", "peft_config", "judges", "eval_dataset", "train_dataset", "callbacks")

    def make(trainer_class: type[PPOTrainer] = PPOTrainer, **changes: Any) -> PPOTrainer:
        own = {name: changes.pop(name) for name in arguments if name in changes}
        own.setdefault("train_dataset", prompts)
        model = changes.pop("model", None)
        return trainer_class(
            model=make_lm() if model is None else model,
            reward_funcs=changes.pop("reward_funcs", LexiconReward()),
            processing_class=changes.pop("processing_class", tokenizer),
            args=make_config(**changes),
            **own,
        )

    return make


@pytest.fixture
def steps() -> Callable[[PPOTrainer], list[dict[str, float]]]:
    """The log of each step of a trainer that has trained."""
    return lambda trainer: [log for log in trainer.state.log_history if "kl/rb" in log]


@pytest.fixture
def gradient(flat_gradient: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The gradient that one minibatch leaves on the policy, as one vector."""

    def measure(
        trainer: PPOTrainer, rollout: Rollout, rows: torch.Tensor, *channels, **options
    ) -> torch.Tensor:
        trainer.model.zero_grad()
        trainer.critic.zero_grad()
        trainer.accumulate_gradient(rollout, rows, *channels, **options)
        return flat_gradient(trainer.model)

    return measure


@pytest.fixture
def flat_gradient() -> Callable[[torch.nn.Module], torch.Tensor]:
    """The gradient on a model as one vector."""

    def flat(model: torch.nn.Module) -> torch.Tensor:
        parts = [p.grad for p in model.parameters() if p.requires_grad]
        return torch.cat([part.double().flatten() for part in parts if part is not None])

    return flat
