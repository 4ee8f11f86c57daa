"""Trainers: KL-penalised PPO with a sampled or the exact token KL; distillation."""

from rlkl.trainers.config import PPOConfig
from rlkl.trainers.distill import DistillTrainer
from rlkl.trainers.distill_config import DistillConfig
from rlkl.trainers.distill_metrics import DISTILL_VOCABULARY
from rlkl.trainers.metrics import VOCABULARY
from rlkl.trainers.ppo import PPOTrainer
from rlkl.trainers.progress import RichProgress, StopOnInterrupt
from rlkl.trainers.rao_blackwell_ppo import RaoBlackwellPPOTrainer

__all__ = [
    "DISTILL_VOCABULARY",
    "VOCABULARY",
    "DistillConfig",
    "DistillTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RaoBlackwellPPOTrainer",
    "RichProgress",
    "StopOnInterrupt",
]
