"""One side of `ppo_step.py` in a process of its own: a few whole PPO updates, timed.

Runs in the Python of rlkl or in that of `trl==1.12.0`, so it imports either only where it is used.
Both sides are timed by the same callback: from the end of one update to the end of the next, so
that everything around an update (data loading, logging, garbage collection) is counted.

    python ppo_step_worker.py '{"side": "trl", "folder": ..., "threads": 1, ...}'

The last line of its output is a JSON object.
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

SCORE_UNIT = 1000.0
"""Ids and lengths are divided by it, so that scores are of the order of 1."""


class UpdateTimer(TrainerCallback):
    """Wall-clock and CPU seconds of every update."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._mark = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        self.wall.append(now[0] - self._mark[0])
        self.cpu.append(now[1] - self._mark[1])
        self._mark = now


class TokenReward(nn.Module):
    """The cheapest reward model that TRL's PPO accepts: the last token's id, no matrix product."""

    base_model_prefix = "trunk"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _IdsAsHidden()
        self.score = nn.Identity()


class _IdsAsHidden(nn.Module):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[input_ids.unsqueeze(-1).float() / SCORE_UNIT])


class FreeCritic(nn.Module):
    """The cheapest value model that TRL's PPO accepts: one number per token id, no trunk at all."""

    base_model_prefix = "trunk"

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.trunk = _EmbeddingAsHidden(vocab_size)
        self.score = nn.Identity()


class _EmbeddingAsHidden(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.values = nn.Embedding(vocab_size, 1)
        nn.init.zeros_(self.values.weight)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[self.values(input_ids)])


class TrunkCritic(nn.Module):
    """rlkl's value function as TRL's PPO accepts it: a linear head on the policy's own trunk.

    TRL runs a value model's trunk by itself, so the policy's trunk is run twice.
    """

    base_model_prefix = "trunk"

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.trunk = policy.base_model
        self.score = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)


def text_reward(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """rlkl's side of the cheapest reward: the number of characters."""
    return torch.tensor([len(text) / SCORE_UNIT for text in responses])


def load_policy(spec: dict[str, Any]) -> Any:
    """The policy of both sides; attention "default" is what transformers picks by itself."""
    attention = None if spec["attention"] == "default" else spec["attention"]
    return AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=torch.float32, attn_implementation=attention
    )


def common_settings(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Training arguments that both sides share."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": spec["batch_size"],
        "num_ppo_epochs": spec["epochs"],
        "num_mini_batches": spec["mini_batches"],
        "response_length": spec["response_length"],
        "temperature": 1.0,
        "kl_coef": 0.05,
        "learning_rate": 1e-5,
        "bf16": spec["precision"] == "bf16",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }


def run_trl(spec: dict[str, Any], prompts: list[str], timer: UpdateTimer) -> dict[str, Any]:
    """TRL's experimental PPO, its dataset tokenised as rlkl's sampler does."""
    import trl  # pyright: ignore[reportMissingImports]
    from trl.experimental.ppo import (  # pyright: ignore[reportMissingImports]
        PPOConfig,
        PPOTrainer,
    )

    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    policy = load_policy(spec)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [bos + tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    critic = TrunkCritic(policy) if spec["critic"] == "trunk" else FreeCritic(len(tokenizer))
    args = PPOConfig(
        **common_settings(spec, spec["folder"]),
        total_episodes=spec["batch_size"] * (spec["warm_up"] + spec["updates"]),
        num_sample_generations=0,
        stop_token="eos",
        local_rollout_forward_batch_size=spec["batch_size"],
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=TokenReward(),
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        callbacks=[timer],
    )
    trainer.train()
    return {"trl": trl.__version__, "attention_used": policy.config._attn_implementation}


def rlkl_trainer(spec: dict[str, Any], prompts: list[str], side: str, callbacks: list[Any]) -> Any:
    """rlkl's PPO: sampled KL ("rlkl") or exact KL ("rlkl_exact")."""
    from rlkl.models import load_causal_lm, load_tokenizer
    from rlkl.trainers import PPOConfig, PPOTrainer, RaoBlackwellPPOTrainer

    attention = None if spec["attention"] == "default" else spec["attention"]
    args = PPOConfig(
        **common_settings(spec, str(Path(spec["folder"]) / side)),
        max_steps=spec["warm_up"] + spec["updates"],
        log_completions_steps=0,
    )
    trainer_class = RaoBlackwellPPOTrainer if side == "rlkl_exact" else PPOTrainer
    return trainer_class(
        model=load_causal_lm(spec["model"], attn_implementation=attention),
        reward_funcs=text_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=load_tokenizer(spec["model"]),
        callbacks=callbacks,
    )


def run_rlkl(spec: dict[str, Any], prompts: list[str], timer: UpdateTimer) -> dict[str, Any]:
    """rlkl's PPO; returns the seconds of each part as its metrics.jsonl logs them."""
    trainer = rlkl_trainer(spec, prompts, spec["side"], [timer])
    trainer.train()
    lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r for r in records if "time/step" in r][spec["warm_up"] :]
    names = [name for name in steps[0] if name.startswith("time/")]
    return {
        "parts": {name: [step[name] for step in steps] for name in names},
        "attention_used": trainer.model.config._attn_implementation,
    }


def run_exact_beside_sampled(spec: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """Updates of the two rlkl trainers in turn, in one process: seconds of each, in pairs.

    A step is what the Trainer does: `training_step`, then clipping and the last optimiser step.
    """
    trainers = {side: rlkl_trainer(spec, prompts, side, []) for side in ("rlkl", "rlkl_exact")}
    for trainer in trainers.values():
        trainer.create_optimizer()
    size = spec["batch_size"]
    wall: dict[str, list[float]] = {side: [] for side in trainers}
    cpu: dict[str, list[float]] = {side: [] for side in trainers}
    for number in range(spec["warm_up"] + spec["updates"]):
        first = number * size % (len(prompts) - size + 1)
        batch = {"columns": {"prompt": prompts[first : first + size]}}
        order = list(trainers) if number % 2 == 0 else list(trainers)[::-1]
        for side in order:
            trainer = trainers[side]
            begin = (time.perf_counter(), time.process_time())
            trainer.training_step(trainer.model, batch)
            parameters = trainer.model.parameters()
            trainer.accelerator.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.state.global_step += 1
            wall[side].append(time.perf_counter() - begin[0])
            cpu[side].append(time.process_time() - begin[1])
    skip = spec["warm_up"]
    return {
        "wall": {side: seconds[skip:] for side, seconds in wall.items()},
        "cpu": {side: seconds[skip:] for side, seconds in cpu.items()},
        "attention_used": trainers["rlkl"].model.config._attn_implementation,
    }


def main() -> None:
    """Reads the specification, runs the side, prints what was measured as the last line."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    prompts = json.loads(Path(spec["prompts"]).read_text())
    result: dict[str, Any] = {}
    if spec["side"] == "exact_beside_sampled":
        result |= run_exact_beside_sampled(spec, prompts)
    else:
        timer = UpdateTimer()
        run = run_trl if spec["side"] == "trl" else run_rlkl
        result |= run(spec, prompts, timer)
        result |= {"wall": timer.wall[spec["warm_up"] :], "cpu": timer.cpu[spec["warm_up"] :]}
    import transformers

    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if "trl" in result:
        result["versions"]["trl"] = result.pop("trl")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
