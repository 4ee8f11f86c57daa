"""What `test_processes.py` starts, by itself and under torchrun: one training for each setting.

    python run_in_processes.py MODEL OUTPUT

A response's draws depend on its prompt and the step alone, and prompts are dealt so that each
update has the same ones, however many processes share them.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, RLOOConfig

from reward_models import LexiconReward
from rlkl.rollout import Responses
from rlkl.rollout.randomness import generator_of
from rlkl.rollout.records import joined
from rlkl.trainers import (
    DistillConfig,
    DistillTrainer,
    PPOConfig,
    RaoBlackwellPPOTrainer,
    StopOnInterrupt,
)
from rlkl.trainers.processes import of_all
from rlkl.trainers.trl import RaoBlackwellGRPOTrainer, RaoBlackwellRLOOTrainer

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
BEGINNINGS = ("the film", "a plot", "I found it", "it", "so the end", "acting", "this", "saw it")
PROMPTS = [f"{beginning}{rest}" for rest in ("", " was") for beginning in BEGINNINGS]
COMPLETIONS = ["very good", "so dull it was not good", "saw it", "was superb"] * 4
SETTINGS = {
    "epochs": {"num_ppo_epochs": 2, "kl_target": 0.05, "kl_horizon": 64},
    "minibatches": {"num_ppo_epochs": 1, "num_mini_batches": 2, "micro_batch_size": 1},
    "generations": {"num_ppo_epochs": 1, "num_generations": 2, "whiten_advantages": True},
    "sampled": {"num_ppo_epochs": 1, "kl_estimator": "k1", "kl_placement": "reward"},
}
TRL = [
    ("rloo", RaoBlackwellRLOOTrainer, RLOOConfig),
    ("grpo", RaoBlackwellGRPOTrainer, GRPOConfig),
]
TRL_HAS_NOT = ("response_length", "train_sampling_strategy")
# The first half of either process's rows is a minibatch.
AS_TWO_PROCESSES_TAKE_THEM = [0, 1, 4, 5, 2, 3, 6, 7]


class PromptwisePPO(RaoBlackwellPPOTrainer):
    """Answers each prompt by itself, and notes which."""

    answered: tuple[str, ...] = ()

    def sample(self, data: Any, generator: torch.Generator, clock: Any) -> Responses:
        """Draws that no other prompt has a part in."""
        parts = []
        self.answered += tuple(data["prompt"])
        for prompt in data["prompt"]:
            generator = generator_of("cpu", self.state.global_step, *prompt.encode())
            parts.append(super().sample({"prompt": [prompt]}, generator, clock))
        return joined(parts)


def by_row(trainer_class: Any) -> Any:
    """A trainer whose responses depend on their rows in the whole batch and the step alone."""

    class ByRow(trainer_class):
        """Draws them anyhow: what is done with them is asked."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *given: Any) -> Any:
            first = self.args.process_index * len(prompt_ids)
            drawn = []
            for row in range(first, first + len(prompt_ids)):
                generator = generator_of("cpu", self.state.global_step, row)
                length = int(torch.randint(1, 6, (), generator=generator))
                drawn.append(torch.randint(1, 30, (length,), generator=generator).tolist())
            return (drawn, None) if trainer_class is RaoBlackwellGRPOTrainer else drawn

    return ByRow


class InterruptsLastProcess(TrainerCallback):
    """A Ctrl-C in the first step that one process alone hears."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sends it."""
        if args.process_index == PROCESSES - 1:
            signal.raise_signal(signal.SIGINT)


def main(model_folder: str, output: Path) -> None:
    """Trains with each setting; the last weights and every record are in its folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def model() -> Any:
        """The first process has the model of the folder, the second begins with another."""
        loaded = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
        if os.environ.get("RANK") == "1":
            loaded.transformer.wte.weight.data.mul_(0.9)
        return loaded

    def common(name: str) -> dict[str, Any]:
        return {
            "output_dir": str(output / name),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": 3,
            "response_length": 6,
            "learning_rate": 3e-3,
            "train_sampling_strategy": "sequential",
        }

    def keep(trainer: Any, name: str, **more: torch.nn.Module) -> None:
        if trainer.is_world_process_zero():
            modules = {"policy": trainer.model, **more}
            weights = {name: module.state_dict() for name, module in modules.items()}
            torch.save(weights, output / name / "weights.pt")

    def ppo(name: str, changes: dict[str, Any], **more: Any) -> PromptwisePPO:
        prompts = PROMPTS
        if PROCESSES == 1 and "num_mini_batches" in changes:
            order = [8 * step + i for step in (0, 1) for i in AS_TWO_PROCESSES_TAKE_THEM]
            prompts = [PROMPTS[i] for i in order]
        settings = common(name) | {"per_device_train_batch_size": 8 // PROCESSES, "kl_coef": 0.1}
        return PromptwisePPO(
            model=model(),
            reward_funcs=LexiconReward(),
            args=PPOConfig(**(settings | changes)),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}),
            processing_class=tokenizer,
            **more,
        )

    for name, changes in SETTINGS.items():
        trainer = ppo(name, changes)
        trainer.evaluate()
        answered = of_all(trainer.answered)
        trainer.train()
        keep(trainer, name, critic=trainer.critic)
        draws = of_all(
            {
                purpose: torch.rand((), generator=trainer._generator(purpose)).item()
                for purpose in ("sampling", "minibatches", "evaluation")
            }
        )
        (output / name / "draws.json").write_text(json.dumps(draws))
        (output / name / "answered.json").write_text(json.dumps(answered))

    # The first of the settings once more; the last process alone is told to stop.
    changes = SETTINGS["epochs"]
    stopped = ppo("stopped", changes, callbacks=[StopOnInterrupt(), InterruptsLastProcess()])
    stopped.train()
    if stopped.state.global_step == 1:
        resumed = ppo("stopped", changes)
        resumed.train(resume_from_checkpoint=True)
        keep(resumed, "stopped", critic=resumed.critic)

    # A group of four is shared by both processes: they have six responses each.
    for name, trainer_class, config_class in TRL:
        trainer = by_row(trainer_class)(
            model=model(),
            reward_funcs=LexiconReward(),
            args=config_class(
                **{k: v for k, v in common(name).items() if k not in TRL_HAS_NOT},
                per_device_train_batch_size=12 // PROCESSES,
                num_generations=4,
                max_completion_length=6,
                beta=0.3,
                activation_checkpointing=False,
                logging_steps=1,
            ),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )
        trainer.train()
        keep(trainer, name)

    teacher = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in teacher.parameters():
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    # A step is the mean of two batches: of two processes, or one after the other.
    distillation = DistillTrainer(
        model=model(),
        teacher_model=teacher,
        args=DistillConfig(
            **common("distill"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2 // PROCESSES,
            logging_steps=1,
            eval_on_policy=True,
            per_device_eval_batch_size=2,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "completion": COMPLETIONS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:5], "completion": COMPLETIONS[:5]}),
        processing_class=tokenizer,
    )
    distillation.evaluate()
    distillation.train()
    keep(distillation, "distill")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
