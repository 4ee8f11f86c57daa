"""The mathematics of PPO as functions of tensors: advantages, losses, rewards. Depends on torch
alone.
"""

from rlkl.rl.advantages import gae, leave_one_out_mean, whiten
from rlkl.rl.losses import clipped_policy_loss, clipped_value_loss
from rlkl.rl.rewards import penalise_missing_eos, token_rewards

__all__ = [
    "clipped_policy_loss",
    "clipped_value_loss",
    "gae",
    "leave_one_out_mean",
    "penalise_missing_eos",
    "token_rewards",
    "whiten",
]
