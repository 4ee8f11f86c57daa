"""How the trainers of a sentiment run differ: their settings, and what these are called."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import ModelConfig

from rlkl.cli.sentiment.settings import GRPOArguments, RLOOArguments, SentimentArguments
from rlkl.trainers import PPOConfig, PPOTrainer, RaoBlackwellPPOTrainer
from rlkl.trainers.guarded_trainer import GuardedTrainer

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class KLTerm:
    """Which KL is penalised, where it enters, and how strongly."""

    estimator: str
    placement: str
    coefficient: float


@dataclass(frozen=True)
class Algorithm:
    """One way to train the policy. All trainers take the same arguments."""

    title: str
    settings: tuple[type, ...]
    """What the YAML and the command line may set."""
    defaults: str
    """The YAML that holds where no other is given."""
    trainer_class: Callable[[Any], Callable[..., GuardedTrainer]]
    """The trainer, by its settings."""
    kl_term: Callable[[Any], KLTerm]
    """Of a trainer."""
    response_length: Callable[[Any], int]
    """The longest response in tokens, by the settings."""
    max_prompt_length: Callable[[Any], int | None]
    """The longest prompt in tokens, likewise; None: any."""
    step: str
    """What a point of the plot is."""
    labels: tuple[str, ...] = ()
    """What W&B's group and tags name before the KL term."""


def _ppo_trainer(args: PPOConfig) -> type[PPOTrainer]:
    return RaoBlackwellPPOTrainer if args.kl_estimator in (None, "rb") else PPOTrainer


def _rloo_trainer(args: RLOOArguments) -> Callable[..., GuardedTrainer]:
    from rlkl.trainers.trl import RaoBlackwellRLOOTrainer  # TRL's trainers are slow to import

    return RaoBlackwellRLOOTrainer


def _grpo_trainer(args: GRPOArguments) -> Callable[..., GuardedTrainer]:
    from rlkl.trainers.trl import RaoBlackwellGRPOTrainer

    return RaoBlackwellGRPOTrainer


def _ppo_kl_term(trainer: PPOTrainer) -> KLTerm:
    return KLTerm(trainer.estimator.name, str(trainer.placement), trainer.args.kl_coef)


def _exact_in_both(trainer: Any) -> KLTerm:
    return KLTerm("rb", "both", trainer.kl_coef)


PPO = Algorithm(
    title="PPO",
    settings=(SentimentArguments, PPOConfig, ModelConfig),
    defaults=str(_HERE / "ppo.yaml"),
    trainer_class=_ppo_trainer,
    kl_term=_ppo_kl_term,
    response_length=lambda args: args.response_length,
    max_prompt_length=lambda args: args.max_prompt_length,
    step="one rollout, all its epochs",
)
RLOO = Algorithm(
    title="RLOO",
    settings=(SentimentArguments, RLOOArguments, ModelConfig),
    defaults=str(_HERE / "rloo.yaml"),
    trainer_class=_rloo_trainer,
    kl_term=_exact_in_both,
    response_length=lambda args: args.max_completion_length,
    max_prompt_length=lambda args: None,
    step="one update; a point for each rollout",
    labels=("rloo",),
)
GRPO = Algorithm(
    title="GRPO",
    settings=(SentimentArguments, GRPOArguments, ModelConfig),
    defaults=str(_HERE / "grpo.yaml"),
    trainer_class=_grpo_trainer,
    kl_term=_exact_in_both,
    response_length=lambda args: args.max_completion_length,
    max_prompt_length=lambda args: None,
    step="one update; a point for each rollout",
    labels=("grpo",),
)
ALGORITHMS = {algorithm.title: algorithm for algorithm in (PPO, RLOO, GRPO)}
