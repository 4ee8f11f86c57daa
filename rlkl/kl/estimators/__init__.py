"""Estimates of the KL of a policy from its reference, token by token, each with what it may claim.

A response y = y_1..y_T is sampled token by token from the policy π; h_t = (prompt, y_<t) is the
prefix of token t, and q is the reference. Two quantities live at each token, in nats:

    u_t = log π(y_t|h_t) - log q(y_t|h_t)                        the sampled log-ratio
    D_t = Σ_v π(v|h_t) [log π(v|h_t) - log q(v|h_t)] = E[u_t | h_t]       the exact token KL

and the KL of the sequence is the expected sum of either: D_KL(π ‖ q) = E[Σ_t u_t] = E[Σ_t D_t].
An estimator gives a k_t per token, whose sum over a response is its estimate of the sequence KL:

    name         k_t                            unbiased  k_t ≥ 0  exact gradient in  needs
    k1           u_t                            yes       no       reward, both       token_logp
    k2           u_t² / 2                       no        yes      nowhere            token_logp
    k3           e^{-u_t} - 1 + u_t             yes       yes      both               token_logp
    rb           D_t                            yes       yes      both               distributions
    topk         Σ_{v∈S} π_v u_v + 1[y_t∉S] u_t  yes       no       both               distributions
    topk_bucket  D_t with all v∉S as one token  no        yes      nowhere            distributions

with S = S_k(h_t) the k likeliest tokens under the policy.
The fourth column says in which placements (`rlkl.kl.placement`) the expected gradient of
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
    topk: EMA Policy Gradient: Taming Reinforcement Learning for LLMs with EMA Anchor and Top-k KL
        (Zhang and Ba, 2026), https://arxiv.org/abs/2602.04417
    gradients: On a few pitfalls in KL divergence gradient estimation for RL (Tang and Munos, 2025),
        https://arxiv.org/abs/2506.09477
    k2 as loss: Rethinking KL Regularization in RLHF: From Value Estimation to Gradient Optimization
        (Liu, Liu, Chen and Liu, 2025), https://arxiv.org/abs/2510.01555: the gradient of k1 in the
        reward, which holds of one step; of a sequence k2 leaves later prefixes out
"""

from rlkl.kl.estimators.base import Claims, Estimator
from rlkl.kl.estimators.distributional import (
    RB,
    TOPK,
    TOPK_BUCKET,
    RaoBlackwellEstimator,
    TopKBucketEstimator,
    TopKEstimator,
)
from rlkl.kl.estimators.sampled import K1, K2, K3, SampledEstimator
from rlkl.kl.placement import KLPlacement

__all__ = [
    "ESTIMATORS",
    "Claims",
    "Estimator",
    "RaoBlackwellEstimator",
    "SampledEstimator",
    "TopKBucketEstimator",
    "TopKEstimator",
    "check_placement",
    "get_estimator",
]

ESTIMATORS: dict[str, Estimator] = {e.name: e for e in (K1, K2, K3, RB, TOPK, TOPK_BUCKET)}
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
