"""Reward models: text in, one float score per text out."""

from reward_models.lexicon import LexiconReward
from reward_models.sentiment import EMBEDDED_JUDGE, EMBEDDED_REWARD, RewardModel, SentimentReward

__all__ = [
    "EMBEDDED_JUDGE",
    "EMBEDDED_REWARD",
    "LexiconReward",
    "RewardModel",
    "SentimentReward",
]
