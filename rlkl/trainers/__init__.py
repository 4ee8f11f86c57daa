"""Trainers: KL-penalised PPO with a sampled or the exact token KL."""

from rlkl.trainers.config import PPOConfig
from rlkl.trainers.metrics import VOCABULARY
from rlkl.trainers.ppo import PPOTrainer
from rlkl.trainers.progress import RichProgress, StopOnInterrupt
from rlkl.trainers.rao_blackwell_ppo import RaoBlackwellPPOTrainer

__all__ = [
    "VOCABULARY",
    "PPOConfig",
    "PPOTrainer",
    "RaoBlackwellPPOTrainer",
    "RichProgress",
    "StopOnInterrupt",
]
