"""Trainers of the tiny model: PPO on the lexicon reward, and distillation of pairs."""

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
from rlkl.trainers import DistillConfig, DistillTrainer, PPOConfig, PPOTrainer
from rlkl.trainers.advantages import Advantages
from rlkl.trainers.text_trainer import TextTrainer

PROMPTS = ["the film is", "a plot", "I found this film and", "it", "so the end was", "acting"]
COMPLETIONS = ["very good", "so dull it was not good", "saw it", "was superb", "bad", "and plot of"]


@pytest.fixture(autouse=True, scope="package")
def _quick_collections() -> None:
    """The Trainer collects garbage at every start: among all imported modules, most of a test."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * 2})


@pytest.fixture
def pairs() -> Dataset:
    """Six pairs, twice."""
    return Dataset.from_dict({"prompt": PROMPTS * 2, "completion": COMPLETIONS * 2})


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
def make_distiller(quick_run, make_lm, tokenizer, pairs) -> Callable[..., DistillTrainer]:
    """Builds a trainer; keywords are those of DistillTrainer first, of DistillConfig otherwise."""
    arguments = ("model", "teacher_model", "train_dataset", "eval_dataset", "peft_config")

    def make(**changes: Any) -> DistillTrainer:
        own: dict[str, Any] = {
            "model": make_lm(seed=1),
            "teacher_model": make_lm(seed=0),
            "train_dataset": pairs,
        }
        own |= {name: changes.pop(name) for name in arguments if name in changes}
        settings = {"logging_steps": 1, "per_device_train_batch_size": 6}
        config = DistillConfig(**(quick_run | settings | changes))
        return DistillTrainer(args=config, processing_class=tokenizer, **own)

    return make


@pytest.fixture
def steps() -> Callable[[TextTrainer], list[dict[str, float]]]:
    """The log of each step of a trainer that has trained: what PPO or distillation measured."""
    measured = {"kl/rb", "divergence/fkl"}
    return lambda trainer: [log for log in trainer.state.log_history if measured & log.keys()]


@pytest.fixture
def gradient(flat_gradient: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The gradient that one minibatch leaves on the policy, as one vector."""

    def measure(
        trainer: PPOTrainer, rollout: Rollout, rows: torch.Tensor, advantages: Advantages, **options
    ) -> torch.Tensor:
        trainer.model.zero_grad()
        trainer.critic.zero_grad()
        trainer.accumulate_gradient(rollout, rows, advantages, **options)
        return flat_gradient(trainer.model)

    return measure


@pytest.fixture
def flat_gradient() -> Callable[[torch.nn.Module], torch.Tensor]:
    """The gradient on a model as one vector."""

    def flat(model: torch.nn.Module) -> torch.Tensor:
        parts = [p.grad for p in model.parameters() if p.requires_grad]
        return torch.cat([part.double().flatten() for part in parts if part is not None])

    return flat
