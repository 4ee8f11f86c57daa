"""Estimates of the KL of a policy from its reference, token by token, each with what it may claim.

A response y = y_1..y_T is sampled token by token from the policy π; h_t = (prompt, y_<t) is the
prefix of token t, and q is the reference. Two quantities live at each token, in nats:

    u_t = log π(y_t|h_t) - log q(y_t|h_t)                        the sampled log-ratio
    D_t = Σ_v π(v|h_t) [log π(v|h_t) - log q(v|h_t)] = E[u_t | h_t]       the exact token KL

and the KL of the sequence is the expected sum of either: D_KL(π ‖ q) = E[Σ_t u_t] = E[Σ_t D_t].
An estimator gives a k_t per token, whose sum over a response is its estimate of the sequence KL:

    name  k_t                  Σ k_t unbiased  k_t ≥ 0  exact gradient in    needs
    k1    u_t                  yes             no       reward, both         log-probs of the token
    k2    u_t² / 2             no              yes      nowhere              log-probs of the token
    k3    e^{-u_t} - 1 + u_t   yes             yes      both                 log-probs of the token
    rb    D_t                  yes             yes      both                 both distributions

The third column says in which placements (`rlkl.kl.placement`) the expected gradient of
`kl_surrogate` is exactly ∇D_KL of the sequence; `check_placement` refuses the others and says what
they optimise. An estimator that is right in value is not thereby right in gradient: differentiated
as a loss, k1 has zero expected gradient, and every k_t leaves out how a token changes the prefixes
to come. Each claim, the true and the false, is checked by enumeration in tests/kl.

All this holds for tokens sampled from π itself: log-probs at the sampling temperature, no top-k or
top-p truncation, no update since the rollout. The library cannot check that. For responses cut at
L tokens, the KL is that of their first L steps.

References:
    k1, k2, k3: Approximating KL Divergence (Schulman, 2020), http://joschu.net/blog/kl-approx.html
    rb: Better Estimation of the KL Divergence Between Language Models (Amini, Vieira and Cotterell,
        2025), https://arxiv.org/abs/2504.10637
    gradients: On a few pitfalls in KL divergence gradient estimation for RL (Tang and Munos, 2025),
        https://arxiv.org/abs/2506.09477
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.divergences import reverse_kl
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
    """k_t depends on y_t, so that the future KL of token t includes k_t itself."""

    other_gradient: Mapping[KLPlacement, str] = field(hash=False)
    """For each placement that does not give ∇D_KL of the sequence: the gradient that it gives."""

    @property
    def exact_gradient(self) -> frozenset[KLPlacement]:
        """The placements in which the expected gradient is exactly that of the sequence KL."""
        return frozenset(p for p in KLPlacement if p not in self.other_gradient)


@dataclass(frozen=True)
class Estimator(ABC):
    """A per-token estimate of the KL: `SampledEstimator` or `RaoBlackwellEstimator`."""

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
            `[B, T]` nats, 0 where masked; differentiable in both log-probabilities.
        """


@final
@dataclass(frozen=True)
class SampledEstimator(Estimator):
    """k_t = f(u_t): a function of the sampled log-ratio u_t = log π(y_t|h_t) - log q(y_t|h_t).

    Example:
        >>> k3 = get_estimator("k3")
        >>> k3.from_token_logp(torch.tensor([-1.0]), torch.tensor([-1.0]))
        tensor([0.])
    """

    formula: Callable[[Tensor], Tensor]

    def __call__(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """f(u_t) of the sampled tokens, `[B, T]` nats, 0 where masked; see `Estimator`."""
        index = torch.where(mask, tokens, 0).long().unsqueeze(-1)
        policy_token_logp = policy_logp.gather(-1, index).squeeze(-1)  # [B, T]
        ref_token_logp = ref_logp.gather(-1, index).squeeze(-1)  # [B, T]
        # Masked before the formula: f(0) = 0, and no nan of the padding reaches the gradient.
        return self.from_token_logp(
            torch.where(mask, policy_token_logp, 0.0), torch.where(mask, ref_token_logp, 0.0)
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


@final
@dataclass(frozen=True)
class RaoBlackwellEstimator(Estimator):
    """k_t = D_t, the exact token KL: u_t averaged over the token, E[u_t | h_t].

    Each token's variance falls, and that of a response as a rule: the sampled token's own noise is
    gone. It is no theorem for the sum, since the covariance *between* tokens changes too. With
    π₁ = (.5, .5), q₁ = (.25, .75), then π = q = (.5, .5) after token 0, and π = (.01, .99),
    q = (.99, .01) after token 1, the mean is 2.39545, Var(Σ u_t) = 3.31591 and
    Var(Σ D_t) = 5.06974: u_1 is negatively correlated with D_2, and averaging it out loses that.

    Reference:
        Better Estimation of the KL Divergence Between Language Models (Amini, Vieira and Cotterell,
        2025), https://arxiv.org/abs/2504.10637

    Example:
        >>> policy_logp = torch.tensor([[[0.5, 0.5]]]).log()
        >>> ref_logp = torch.tensor([[[0.25, 0.75]]]).log()
        >>> tokens, mask = torch.tensor([[0]]), torch.tensor([[True]])
        >>> get_estimator("rb")(policy_logp, ref_logp, tokens, mask)
        tensor([[0.1438]])
    """

    def __call__(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """D_t, whatever token was sampled, `[B, T]` nats, 0 where masked; see `Estimator`."""
        real = mask.unsqueeze(-1)
        # Masked before the formula: equal distributions have KL 0, and no nan reaches the gradient.
        return self.from_distributions(
            torch.where(real, policy_logp, 0.0), torch.where(real, ref_logp, 0.0)
        )

    def from_distributions(
        self, policy_logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]
    ) -> Float[Tensor, "*shape"]:
        """D_t from log-probabilities or logits; `rlkl.kl.fused` has it from hidden states."""
        return reverse_kl(policy_logp, ref_logp)


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


_K1 = SampledEstimator(
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

_K2 = SampledEstimator(
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

_K3 = SampledEstimator(
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

_RB = RaoBlackwellEstimator(
    name="rb",
    claims=Claims(
        unbiased=True,
        non_negative=True,
        needs="distributions",
        own_token=False,
        other_gradient={
            KLPlacement.REWARD: "the own-token gradient Σ_t E[∇D_t] is dropped: only the KL of "
            "later prefixes is held",
            KLPlacement.LOSS: "it is the token-level gradient Σ_t E[∇D_t]: how a token changes the "
            "KL of later prefixes is left out",
        },
    ),
)

ESTIMATORS: dict[str, Estimator] = {e.name: e for e in (_K1, _K2, _K3, _RB)}
"""Every estimator by name."""


def get_estimator(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        ValueError: there is none; the message lists those there are.

    Example:
        >>> get_estimator("rb").claims.own_token
        False
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is unknown; use one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def check_placement(
    estimator: Estimator, placement: KLPlacement | str, allow_biased_kl: bool = False
) -> None:
    """Refuses a placement in which the estimator does not give the gradient of the sequence KL.

    Raises:
        ValueError: it does not, and `allow_biased_kl` is False; the message says which gradient
            would be followed instead, and what to use.

    Example:
        >>> check_placement(get_estimator("rb"), "both")
        >>> check_placement(get_estimator("k1"), "loss", allow_biased_kl=True)
    """
    placement = KLPlacement(placement)
    exact = estimator.claims.exact_gradient
    if allow_biased_kl or placement in exact:
        return
    right = [f"placement {str(p)!r}" for p in KLPlacement if p in exact]
    remedy = " or ".join(right) or "estimator 'rb' with placement 'both'"
    raise ValueError(
        f"placement {str(placement)!r} with estimator {estimator.name!r} does not follow the "
        f"gradient of D_KL(policy ‖ ref): {estimator.claims.other_gradient[placement]}; "
        f"use {remedy}, or set allow_biased_kl=True to train so all the same"
    )
