"""The settings of the PPO trainers, on top of transformers.TrainingArguments."""

import math
from dataclasses import dataclass, field

from rlkl.kl import AdaptiveKLCoefficient, FixedKLCoefficient, KLCoefficient
from rlkl.trainers.run_config import RunArguments, check_numbers


@dataclass
class PPOConfig(RunArguments):
    """Settings of :class:`rlkl.trainers.PPOTrainer`; names are TRL's where TRL has one.

    One *step* is one whole PPO update: sample, score, measure, several epochs of minibatches.
    ``max_steps``, ``logging_steps``, ``save_steps`` and the learning-rate schedule count these.
    ``per_device_train_batch_size`` is the number of prompts of a step.
    """

    response_length: int = field(
        default=48, metadata={"help": "Longest response, in tokens; longer ones are cut."}
    )
    num_generations: int = field(default=1, metadata={"help": "Responses sampled to each prompt."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "Logits are divided by it, in sampling and in every probability."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt in tokens; longer ones lose their beginning."},
    )
    local_rollout_forward_batch_size: int = field(
        default=256,
        metadata={"help": "Responses sampled together, also in evaluations; fewer save memory."},
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(
        default=1, metadata={"help": "Optimiser steps per epoch; must divide the batch."}
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Responses per forward pass, to save memory; None: a whole minibatch."},
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "β ≥ 0: reward units per nat; 0 still measures the KL."}
    )
    kl_estimator: str | None = field(
        default=None,
        metadata={"help": "k1, k2, k3 or rb; None: the trainer's own (PPO k1, Rao-Blackwell rb)."},
    )
    kl_placement: str | None = field(
        default=None, metadata={"help": "reward, loss or both; None: the trainer's own."}
    )
    allow_biased_kl: bool = field(
        default=False,
        metadata={"help": "Train with a KL term whose gradient is not that of the sequence KL."},
    )
    kl_off_policy: str = field(
        default="none",
        metadata={
            "help": "From the second update of a rollout on: none (its KL as measured), prefix "
            "(importance weights of the prefixes: the exact gradient of the sequence KL), or "
            "prefix_truncated (weights of at most kl_weight_bound)."
        },
    )
    kl_weight_bound: float = field(
        default=2.0, metadata={"help": "Largest prefix weight of prefix_truncated, at least 1."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Nats per response to hold by an adaptive β (Ziegler et al. 2019)."},
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Responses in which an adaptive β moves by up to a fifth."},
    )
    cliprange: float = field(default=0.2, metadata={"help": "ε of the policy ratio."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "ε of the value, in units of the score."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount γ."})
    lam: float = field(default=0.95, metadata={"help": "λ of generalised advantage estimation."})
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Advantages to mean 0, variance 1; the loss-side KL is scaled alike."},
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a response that did not end."}
    )
    separate_value_model: bool = field(
        default=False,
        metadata={"help": "Value head on a trunk of its own (a copy of the policy's)."},
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic; None: the policy's."}
    )
    log_completions_steps: int = field(
        default=10, metadata={"help": "Steps between completions tables; 0 for none."}
    )
    num_completions: int = field(default=8, metadata={"help": "Rows of a completions table."})

    # Default of TrainingArguments that differs for on-policy training.
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Every step has the same number of prompts."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric_for_best_model in ("loss", "eval_loss"):  # loss is transformers' default
            raise ValueError(
                "metric_for_best_model is the loss, which an evaluation of PPO has not: set it to "
                "objective/scores, for example"
            )
        positive = (
            "response_length",
            "num_generations",
            "local_rollout_forward_batch_size",
            "num_ppo_epochs",
            "num_mini_batches",
            "temperature",
            "cliprange",
            "cliprange_value",
        )
        for name in positive:
            if not getattr(self, name) > 0:  # nan is not either
                raise ValueError(f"{name} is {getattr(self, name)}; it must be > 0")
        if self.temperature == math.inf:
            raise ValueError("temperature is inf; it must be finite")
        for name in ("max_prompt_length", "num_completions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("vf_coef", "missing_eos_penalty", "value_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be >= 0 and finite")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.fp16:
            raise ValueError(
                "fp16 autocast is not for PPO here, whose epochs would each need their own scaling "
                "of the gradient: use bf16"
            )
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(
                f"kl_coef is {self.kl_coef}; it must be >= 0 and finite (0 trains without penalty "
                "and still measures the KL)"
            )
        if self.kl_off_policy not in ("none", "prefix", "prefix_truncated"):
            raise ValueError(
                f"kl_off_policy is {self.kl_off_policy!r}; use none, prefix or prefix_truncated"
            )
        if not self.kl_weight_bound >= 1:
            raise ValueError(f"kl_weight_bound is {self.kl_weight_bound}; it must be at least 1")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; a step is a "
                "whole PPO update here: to save memory set micro_batch_size"
            )
        if self.responses_per_step % self.num_mini_batches:
            raise ValueError(
                f"{self.responses_per_step} responses per step (per_device_train_batch_size × "
                f"num_generations) do not divide into num_mini_batches={self.num_mini_batches}"
            )
        micro = self.micro_batch_size
        if micro is not None and (micro <= 0 or self.mini_batch_size % micro):
            raise ValueError(
                f"minibatches of {self.mini_batch_size} responses do not divide into "
                f"micro_batch_size={micro}"
            )

        step = self.responses_per_step * self.world_size
        if self.kl_target is not None and self.kl_horizon <= step:
            raise ValueError(
                f"kl_horizon is {self.kl_horizon}; an adaptive β moves by up to 20% in as many "
                f"responses: use more than a step's {step}"
            )
        check_numbers(self)

    def kl_coefficient(self) -> KLCoefficient:
        """β: `kl_coef`, or what is adapted from there towards `kl_target`."""
        if self.kl_target is None:
            return FixedKLCoefficient(self.kl_coef)
        return AdaptiveKLCoefficient(self.kl_coef, self.kl_target, self.kl_horizon)

    @property
    def responses_per_step(self) -> int:
        """B: prompts times responses to each."""
        return self.per_device_train_batch_size * self.num_generations

    @property
    def mini_batch_size(self) -> int:
        """Responses per optimiser step."""
        return self.responses_per_step // self.num_mini_batches
