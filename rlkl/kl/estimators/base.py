"""What every token-level estimator is: a name, claims, and k_t from two distributions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.placement import KLPlacement


@dataclass(frozen=True)
class Claims:
    """What an estimator promises of its k_t; each field is tested by enumeration."""

    unbiased: bool
    """E[Σ_t k_t] is D_KL(policy ‖ ref) of the sequence."""

    non_negative: bool
    """k_t ≥ 0 at every token."""

    needs: Literal["token_logp", "distributions"]
    """Log-probs of the sampled token, or the whole next-token distributions."""

    own_token: bool
    """The future KL of token t includes k_t itself: k_t depends on y_t, and ∇k_t alone misses it.

    False where E[∇k_t | h_t] is already ∇E[k_t | h_t] = ∇D_t (of an unbiased estimate), since k_t
    depends on the prefix only (rb) or carries its own score-function term (topk).
    """

    other_gradient: Mapping[KLPlacement, str] = field(hash=False)
    """For each placement that does not give ∇D_KL of the sequence: the gradient that it gives."""

    @property
    def exact_gradient(self) -> frozenset[KLPlacement]:
        """The placements in which the expected gradient is exactly that of the sequence KL."""
        return frozenset(p for p in KLPlacement if p not in self.other_gradient)


@dataclass(frozen=True)
class Estimator(ABC):
    """A per-token estimate of the KL, from the sampled token or from whole distributions."""

    name: str
    claims: Claims

    @abstractmethod
    def __call__(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """k_t from next-token log-probabilities.

        Args:
            policy_logp: log π(·|h_t), at the temperature that sampled `tokens`.
            ref_logp: log q(·|h_t), at the same temperature.
            tokens: the sampled y_t.
            mask: True = response token. Padding may hold anything, nan and invalid ids included.

        Returns:
            `[B, T]` nats, 0 where masked; differentiable in policy_logp. u_t counts as 0 at a token
            that the policy gives no probability, and so cannot have sampled (0 · log 0 = 0).
        """
