"""What later updates of a rollout change in PPO's KL term, so that it stays the sequence KL's.

The rollout was sampled by π_old; from its second update on the policy π is another one. Left alone,
the KL in the reward is that of π_old, and the KL in the loss is taken at the prefixes that π_old
visits. With the weights W_t of `rlkl.kl.off_policy`, the gradient of D_KL(π ‖ ref) is, on the same
responses,

    Σ_t W_t ∇k_t  +  Σ_t g_t F_t,    F_t = Σ_{s>t} W_s k_s,    g_t = ∇log π(y_t|h_t)

Advantages mix the KL with the score, so the KL in them cannot be weighted by itself; its part of
the policy loss, β Σ_t r_t G_t with G_t = Σ_{s>t} k_s of the rollout, is taken out where it has a
gradient (where the ratio r_t is not clipped), and β Σ_t F_t log π(y_t) put in. At π = π_old both
are the same, and nothing changes. Exact where the advantages hold that part undiscounted
(γ = λ = 1); with GAE, as exact as the critic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.kl import future_kl, prefix_channels


class PrefixCorrection(NamedTuple):
    """Constants of N tokens."""

    pathwise: Tensor
    """[N] W_t, the weight of k_t in the loss."""
    now: Tensor
    """[N] F_t, the future KL of the policy as it is, weighted; nats."""
    rollout: Tensor
    """[N] G_t, the future KL that the advantages hold; nats."""

    def loss(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
        """[N] F_t log π(y_t) − G_t r_t where the clipped policy loss has a gradient in r_t.

        >>> one = torch.ones(1)
        >>> correction = PrefixCorrection(pathwise=one, now=3 * one, rollout=2 * one)
        >>> logp = torch.zeros(1, requires_grad=True)
        >>> correction.loss(logp, torch.zeros(1), one, 0.2).sum().backward()
        >>> logp.grad
        tensor([1.])
        """
        ratio = (logp - old_logp).exp()
        bounded = ratio.detach().clamp(1 - cliprange, 1 + cliprange)
        unclipped = ratio.detach() * advantages <= bounded * advantages
        return self.now * logp - torch.where(unclipped, self.rollout, 0.0) * ratio


def prefix_correction(
    k: Tensor,
    old_k: Tensor,
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    *,
    own_token: bool,
    future: bool,
    truncate_at: float | None,
) -> PrefixCorrection:
    """The correction from token statistics [B, T] of the policy as it is and of the rollout.

    Args:
        k: the estimate of the policy as it is.
        old_k: that of the rollout, by which it was rewarded.
        logp: log π(y_t|h_t).
        old_logp: log π_old(y_t|h_t).
        mask: True = response token.
        own_token: `estimator.claims.own_token`.
        future: whether the KL is in the reward.
        truncate_at: the largest weight; None for no bound.
    """
    channels = prefix_channels(
        k, logp, old_logp, mask, own_token=own_token, truncate_at=truncate_at
    )
    now, rollout = channels.future, future_kl(old_k, mask, own_token)
    if not future:
        now, rollout = torch.zeros_like(now), torch.zeros_like(rollout)
    return PrefixCorrection(channels.pathwise[mask], now[mask], rollout[mask])
