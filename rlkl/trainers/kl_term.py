"""The KL in PPO's token loss, and what keeps it the sequence KL's in later updates of a rollout.

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

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.kl import (
    Estimator,
    KLPlacement,
    SampledEstimator,
    TokenLogp,
    TokenStats,
    future_kl,
    prefix_channels,
)
from rlkl.rollout import Rollout, scatter_tokens
from rlkl.rollout.summary import token_kl


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


@dataclass(frozen=True)
class KLTerm:
    """The KL of each token in the loss; what is in the reward, the advantages hold."""

    estimator: Estimator
    placement: KLPlacement
    beta: float
    """β, in units of the advantages."""
    cliprange: float

    def __call__(
        self, stats: TokenStats | TokenLogp, old_logp: Tensor, advantage: Tensor, *prefix: Tensor
    ) -> Tensor:
        """[N] β k_t, 0 if the KL is in the reward only; with the fields of a `PrefixCorrection`
        weighted by W_t, and the reward's part corrected.
        """
        term, weight = torch.zeros_like(old_logp), self.beta
        if prefix:
            correction = PrefixCorrection(*prefix)
            logps = stats.policy_logp, old_logp
            term = self.beta * correction.loss(*logps, advantage, self.cliprange)
            weight = self.beta * correction.pathwise
        if self.placement is KLPlacement.REWARD:
            return term
        assert isinstance(stats, TokenStats)  # a KL in the loss is computed with the reference
        return term + weight * self.k(stats)

    def k(self, stats: TokenStats) -> Tensor:
        """[N] k_t with its gradient."""
        if isinstance(self.estimator, SampledEstimator):
            return self.estimator.from_token_logp(stats.policy_logp, stats.ref_logp)
        return stats.kl

    def correction(
        self, stats: TokenStats, rollout: Rollout, rows: Tensor, truncate_at: float | None
    ) -> PrefixCorrection:
        """What to correct by at the tokens of `rows`, from their statistics under the policy as
        it is; `truncate_at` is the largest weight, None for no bound.
        """
        mask = rollout.responses.rows(rows).mask
        old_logp, old_k = (
            x[rows, : mask.shape[1]]
            for x in (rollout.tokens.policy_logp, token_kl(self.estimator.name, rollout))
        )
        own = self.estimator.claims.own_token
        k, logp = (scatter_tokens(x, mask) for x in (self.k(stats), stats.policy_logp))
        weights, now = prefix_channels(
            k, logp, old_logp, mask, own_token=own, truncate_at=truncate_at
        )
        held = future_kl(old_k, mask, own)
        if self.placement is KLPlacement.LOSS:
            now, held = torch.zeros_like(now), torch.zeros_like(held)
        return PrefixCorrection(weights[mask], now[mask], held[mask])
