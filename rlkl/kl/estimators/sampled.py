"""Estimators that look at the sampled token alone: k1, k2, k3."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.estimators.base import Claims, Estimator
from rlkl.kl.placement import KLPlacement


@final
@dataclass(frozen=True)
class SampledEstimator(Estimator):
    """k_t = f(u_t): a function of the sampled log-ratio u_t = log π(y_t|h_t) - log q(y_t|h_t).

    Example:
        >>> K3.from_token_logp(torch.tensor([-1.0]), torch.tensor([-1.0]))
        tensor([0.])
    """

    formula: Callable[[Tensor], Tensor]

    def per_token(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """f(u_t) of the sampled tokens."""
        index = torch.where(mask, tokens, 0).long().unsqueeze(-1)
        policy_token_logp = policy_logp.gather(-1, index).squeeze(-1)  # [B, T]
        ref_token_logp = ref_logp.gather(-1, index).squeeze(-1)  # [B, T]
        real = mask & (policy_token_logp > -torch.inf)
        # Masked before the formula: f(0) = 0, and no nan of the padding reaches the gradient.
        return self.from_token_logp(
            torch.where(real, policy_token_logp, 0.0), torch.where(real, ref_token_logp, 0.0)
        )

    def from_token_logp(
        self, policy_token_logp: Float[Tensor, "*shape"], ref_token_logp: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """f(u_t) from the log-probs of the sampled tokens alone, which is all that a trainer holds.

        Nothing is masked and nothing is clamped: k3 of a token far likelier under the reference
        may overflow to inf.

        Returns:
            The shape given, in nats; differentiable in both.
        """
        return self.formula(policy_token_logp - ref_token_logp)


def k1(log_ratio: Tensor) -> Tensor:
    """u: unbiased, of either sign."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """u² / 2: biased, with the token-level gradient ∇D_t in expectation when differentiated."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """e^{-u} - 1 + u ≥ 0: u plus a control variate of mean 0.

    That mean is 0, and k3 unbiased, only where the policy gives some mass to every token that the
    reference does; otherwise E[k3] = D_t less the reference's mass on the tokens excluded.
    """
    return torch.expm1(-log_ratio) + log_ratio


K1 = SampledEstimator(
    name="k1",
    formula=k1,
    claims=Claims(
        unbiased=True,
        non_negative=False,
        needs="token_logp",
        own_token=True,
        other_gradient={
            KLPlacement.LOSS: "its expectation is zero: nothing pulls towards the reference",
        },
    ),
)

K2 = SampledEstimator(
    name="k2",
    formula=k2,
    claims=Claims(
        unbiased=False,
        non_negative=True,
        needs="token_logp",
        own_token=True,
        other_gradient={
            KLPlacement.REWARD: "it is ∇E[Σ u²/2], a different objective, less the token-level "
            "gradient Σ_t E[∇D_t]",
            KLPlacement.LOSS: "it is the token-level gradient Σ_t E[∇D_t]: how a token changes the "
            "KL of later prefixes is left out",
            KLPlacement.BOTH: "it is ∇E[Σ u²/2], a different objective",
        },
    ),
)

K3 = SampledEstimator(
    name="k3",
    formula=k3,
    claims=Claims(
        unbiased=True,
        non_negative=True,
        needs="token_logp",
        own_token=True,
        other_gradient={
            KLPlacement.REWARD: "it is ∇D_KL less the gradient of the forward token KL, "
            "Σ_t E[∇D_KL(ref ‖ policy)(h_t)]",
            KLPlacement.LOSS: "it is the gradient of the forward token KL, "
            "Σ_t E[∇D_KL(ref ‖ policy)(h_t)]",
        },
    ),
)
