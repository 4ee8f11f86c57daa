"""From a measured rollout to what its updates follow: token rewards, advantages, returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.kl import Estimator, KLPlacement, kl_rewards, sequence_kl
from rlkl.rl import gae, penalise_missing_eos, token_rewards, whiten
from rlkl.rollout import Rollout
from rlkl.rollout.summary import token_kl
from rlkl.trainers.config import PPOConfig
from rlkl.trainers.step import explained_variance


class Advantages(NamedTuple):
    """Constants of a rollout's updates."""

    tokens: Tensor
    """[B, T] A_t, divided by σ; 0 where masked."""
    returns: Tensor
    """[B, T] R_t, what the critic is to predict."""
    scale: Tensor
    """σ, their standard deviation where advantages are whitened, else 1."""

    def of(self, rollout: Rollout, first_row: int) -> "Advantages":
        """Those of a rollout that is part of the one these are of, from `first_row` on."""
        mask = rollout.responses.mask
        rows = slice(first_row, first_row + len(mask))
        tokens, returns = (x[rows, : mask.shape[1]].to(mask.device) for x in self[:2])
        return self._replace(tokens=tokens, returns=returns)


def rollout_advantages(
    rollout: Rollout,
    estimator: Estimator,
    placement: KLPlacement,
    kl_coef: float,
    args: PPOConfig,
) -> tuple[Advantages, dict[str, float]]:
    """Advantages of the score less β times the KL that is in the reward, and metrics of both.

    Raises:
        ValueError: the KL is infinite.
    """
    mask = rollout.responses.mask
    k = token_kl(estimator.name, rollout)
    if not bool(k.isfinite().all()):
        raise ValueError(
            f"the KL by {estimator.name} is infinite: the reference gives no probability to what "
            "the policy gives some; use a reference that allows the same tokens"
        )
    cost = torch.zeros_like(k)
    if placement is not KLPlacement.LOSS:
        cost = kl_rewards(k, mask, own_token=estimator.claims.own_token)
    scores = penalise_missing_eos(rollout.scores, rollout.responses.ended, args.missing_eos_penalty)
    rewards = token_rewards(scores, cost, mask, kl_coef)
    values = rollout.tokens.values
    assert values is not None  # the trainer always passes its critic
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
    scale = torch.ones(())
    if args.whiten_advantages:
        advantages, scale = whiten(advantages, mask)
    metrics = {
        "objective/kl": float(sequence_kl(k, mask).mean()),
        "objective/non_score_reward": float(-kl_coef * cost.sum(1).mean()),
        "objective/rlhf_reward": float(rewards.sum(1).mean()),
        "kl_coef": kl_coef,
        "val/explained_variance": explained_variance(values[mask], returns[mask]),
        "val/advantage_std": float(scale),
    }
    return Advantages(advantages, returns, scale), metrics
