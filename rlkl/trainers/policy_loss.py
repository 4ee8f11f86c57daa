"""Policy loss and KL of one minibatch, from hidden states; the vocabulary is seen in chunks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlkl.kl import (
    Estimator,
    KLPlacement,
    SampledEstimator,
    TokenLogp,
    TokenStats,
    fused_logp_loss,
    fused_token_loss,
    fused_token_stats,
)
from rlkl.models import output_head, reference_model
from rlkl.rl import clipped_policy_loss
from rlkl.rollout import Rollout, scatter_tokens
from rlkl.rollout.summary import token_kl
from rlkl.trainers.config import PPOConfig
from rlkl.trainers.off_policy import PrefixCorrection, prefix_correction


class PolicyLossParts(NamedTuple):
    """The share of some responses' N tokens in a mean over a minibatch's tokens."""

    loss: Tensor
    """Policy and KL loss; differentiable once, in the hidden states and the head."""
    policy_loss: Tensor
    """The clipped policy loss in it, detached."""
    kl_loss: Tensor
    """The differentiated k_t's part of it, detached. (With prefix weights the two are not all:
    `PrefixCorrection.loss` has a gradient to give, and a value that says nothing.)"""
    logp: Tensor
    """[N] log π(y_t|h_t), detached."""


@dataclass(frozen=True)
class PolicyLoss:
    """Mean over tokens of the clipped policy loss plus β times the KL term.

    The KL in the reward is in the advantages already; here is what is differentiated: k_t in the
    loss, and, for updates after a rollout's first, the correction by prefix weights.
    """

    model: nn.Module
    ref_model: nn.Module | None
    estimator: Estimator
    placement: KLPlacement
    args: PPOConfig

    def __call__(
        self,
        rollout: Rollout,
        rows: Tensor,
        hidden: Tensor,
        advantages: Tensor,
        beta: float,
        count: Tensor,
        *,
        off_policy: bool = False,
    ) -> PolicyLossParts:
        """The loss of the responses `rows` of a rollout.

        Args:
            rollout: what was sampled and measured.
            rows: which of its responses.
            hidden: [N, H] the policy's states at their tokens, with their graph.
            advantages: [B, T] of the whole rollout.
            beta: the KL coefficient, divided by the scale of the advantages.
            count: tokens of the minibatch, over all its microbatches.
            off_policy: take the KL of the policy as it is now, by weights of the prefixes.
        """
        batch, old, args = rollout.responses.rows(rows), rollout.tokens, self.args
        old_logp, ref_logp, advantage, ref_hidden = (
            x[rows, : batch.tokens.shape[1]][batch.mask]
            for x in (old.policy_logp, old.ref_logp, advantages, old.ref_hidden)
        )
        constants = (old_logp, advantage)
        if off_policy:
            constants += self._prefix_correction(rollout, rows, hidden.detach())

        def kl_term(stats: TokenStats | TokenLogp, *prefix: Tensor) -> Tensor:
            if not isinstance(stats, TokenStats):
                return torch.zeros_like(stats.policy_logp)
            weight = beta * PrefixCorrection(*prefix).pathwise if prefix else beta
            return weight * self._k(stats)

        def policy_term(
            stats: TokenStats | TokenLogp, old_logp: Tensor, advantage: Tensor
        ) -> Tensor:
            return clipped_policy_loss(stats.policy_logp, old_logp, advantage, args.cliprange)

        def token_loss(
            stats: TokenStats | TokenLogp, old_logp: Tensor, advantage: Tensor, *prefix: Tensor
        ) -> Tensor:
            term = kl_term(stats, *prefix)
            if prefix:
                logps = stats.policy_logp, old_logp
                correction = PrefixCorrection(*prefix).loss(*logps, advantage, args.cliprange)
                term = beta * correction + term
            return (policy_term(stats, old_logp, advantage) + term).sum() / count

        policy, tokens = (hidden, output_head(self.model)), batch.tokens[batch.mask]
        precision = {"temperature": args.temperature, "gemm_dtype": args.gemm_dtype}
        if self.placement is KLPlacement.REWARD:
            loss, stats = fused_logp_loss(token_loss, *policy, tokens, *constants, **precision)
        else:
            with reference_model(self.model, self.ref_model) as ref:
                reference = (ref_hidden, output_head(ref))
            loss, stats = fused_token_loss(
                token_loss,
                *policy,
                *reference,
                tokens,
                *constants,
                ref_logp=ref_logp,
                **precision,
            )
        with torch.no_grad():
            policy_loss = policy_term(stats, *constants[:2]).sum() / count
            kl_loss = kl_term(stats, *constants[2:]).sum() / count
        return PolicyLossParts(loss, policy_loss, kl_loss, stats.policy_logp)

    @torch.no_grad()
    def _prefix_correction(
        self, rollout: Rollout, rows: Tensor, hidden: Tensor
    ) -> PrefixCorrection:
        """The correction of every token of `rows`, from the policy's hidden states there."""
        batch, old, args = rollout.responses.rows(rows), rollout.tokens, self.args
        mask, old_kl = batch.mask, token_kl(self.estimator.name, rollout)
        ref_hidden, old_logp, old_kl = (
            x[rows, : mask.shape[1]] for x in (old.ref_hidden, old.policy_logp, old_kl)
        )
        with reference_model(self.model, self.ref_model) as ref:
            reference = output_head(ref)
        stats = fused_token_stats(
            hidden,
            output_head(self.model),
            ref_hidden[mask],
            reference,
            batch.tokens[mask],
            temperature=args.temperature,
            whole_rows=True,
            gemm_dtype=args.gemm_dtype,
        )
        truncated = args.kl_off_policy == "prefix_truncated"
        return prefix_correction(
            scatter_tokens(self._k(stats), mask),
            old_kl,
            scatter_tokens(stats.policy_logp, mask),
            old_logp,
            mask,
            own_token=self.estimator.claims.own_token,
            future=self.placement is not KLPlacement.LOSS,
            truncate_at=args.kl_weight_bound if truncated else None,
        )

    def _k(self, stats: TokenStats) -> Tensor:
        """k_t with its gradient, from one chunk's statistics."""
        if isinstance(self.estimator, SampledEstimator):
            return self.estimator.from_token_logp(stats.policy_logp, stats.ref_logp)
        return stats.kl
