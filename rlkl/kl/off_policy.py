"""The KL of a policy π estimated from responses that another policy μ sampled.

μ is the policy as it was at the rollout, an asynchronous sampler, or another program. Expectations
under π become expectations under μ by weights. Of token t, with r_t = π(y_t|h_t) / μ(y_t|h_t),

    W_t     = Π_{s<t} r_s          the prefix weight: all that D_t needs, being exact in y_t
    W_{t+1} = Π_{s≤t} r_s          with the token itself: for what depends on y_t (u_t)

    D_KL(π ‖ q) = E_μ[Σ_t W_t D_t] = E_μ[Σ_t W_{t+1} u_t].

The first varies far less than the second, and less still than the whole response's weight
Π_t r_t · Σ_t u_t. Its gradient is that of the sequence KL if the weights are differentiated too:

    ∇D_KL(π ‖ q) = E_μ[Σ_t W_t ∇D_t + Σ_t D_t W_t Σ_{s<t} g_s],    g_s = ∇log π(y_s|h_s)
                 = E_μ[Σ_t W_t ∇D_t + Σ_t g_t Σ_{s>t} W_s D_s]

so at π = μ it is the on-policy gradient of `rlkl.kl.placement`, pathwise part plus future.

What the field does instead is to weight each token by its own ratio r_t (`token_ratio_surrogate`):
the token's distribution is then right, that of its prefixes remains μ's.

Weights have heavy tails: the product of T ratios may be huge for a few responses. `truncate_at`
bounds each weight by c; E[min(W, c)] < E[W], so it biases a KL of non-negative terms (D_t)
downwards. It is never done unless asked for, and `truncated_fraction` says how often it would be.

Tensors that are not all [B, T], and masks that are not bool, are refused by a ValueError.

All weights are 1, and every formula that of one policy, where π = μ. Where π gives y_t no
probability, W_{t+1} and all weights after it are 0, and so is a term of weight 0, whatever its k_t.

References:
    prefix weights as such: Eligibility Traces for Off-Policy Policy Evaluation (Precup, Sutton and
        Singh, 2000), per-decision importance sampling
    token ratio on k3: DeepSeek-V3.2 (2025), https://arxiv.org/abs/2512.02556
    the sequence-level gradient, named as an open problem: A Comedy of Estimators (Shah et al.,
        2025), https://arxiv.org/abs/2512.21852
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlkl.kl.placement import future_kl
from rlkl.kl.shapes import check_per_token


def token_ratios(
    policy_token_logp: Float[Tensor, "B T"],
    sampler_token_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """r_t = π(y_t|h_t) / μ(y_t|h_t), 1 where masked; differentiable in `policy_token_logp`.

    Example:
        >>> policy, sampler = torch.tensor([[0.2, 0.5]]).log(), torch.tensor([[0.4, 0.1]]).log()
        >>> token_ratios(policy, sampler, torch.tensor([[True, False]]))
        tensor([[0.5000, 1.0000]])
    """
    return _log_ratio(policy_token_logp, sampler_token_logp, mask).exp()


def prefix_weights(
    policy_token_logp: Float[Tensor, "B T"],
    sampler_token_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    own_token: bool = False,
    truncate_at: float | None = None,
) -> Float[Tensor, "B T"]:
    """W_t = Π_{s<t} π(y_s|h_s) / μ(y_s|h_s), 1 at the first token; masked tokens count as ratio 1.

    Differentiable in `policy_token_logp`: ∇W_t = W_t Σ_{s<t} g_s, truncated or not.

    Args:
        policy_token_logp: log π(y_t|h_t).
        sampler_token_logp: log μ(y_t|h_t) of the policy that sampled, at the sampling temperature.
        mask: True = response token.
        own_token: W_{t+1} in place of W_t: the token's own ratio included.
        truncate_at: c of min(W_t, c); None does not truncate. It biases every mean it enters.

    Raises:
        ValueError: `truncate_at` is below 1, where even on-policy weights would be cut.

    Example:
        >>> policy, sampler = torch.tensor([[0.2, 0.5, 1.0]]).log(), torch.tensor([[0.4] * 3]).log()
        >>> prefix_weights(policy, sampler, torch.ones(1, 3, dtype=torch.bool))
        tensor([[1.0000, 0.5000, 0.6250]])
    """
    log_weights = _log_ratio(policy_token_logp, sampler_token_logp, mask).cumsum(1)
    if not own_token:
        log_weights = torch.nn.functional.pad(log_weights[:, :-1], (1, 0))
    return _exp(log_weights, truncate_at)


def response_weights(
    policy_token_logp: Float[Tensor, "B T"],
    sampler_token_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    truncate_at: float | None = None,
) -> Float[Tensor, " B"]:
    """π(y) / μ(y) of each whole response; differentiable in `policy_token_logp`.

    Raises:
        ValueError: `truncate_at` is below 1.

    Example:
        >>> policy, sampler = torch.tensor([[0.2, 0.5]]).log(), torch.tensor([[0.4, 0.4]]).log()
        >>> response_weights(policy, sampler, torch.ones(1, 2, dtype=torch.bool))
        tensor([0.6250])
    """
    log_ratio = _log_ratio(policy_token_logp, sampler_token_logp, mask)
    return _exp(log_ratio.sum(1), truncate_at)


def effective_sample_size(weights: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """(Σ w)² / Σ w²: how many equally weighted responses B weighted ones are worth, 1 to B.

    Invariant to the scale of the weights; B where they are equal, and near 1 where one rules.

    Example:
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 1.0, 5.0]))
        tensor(2.2857)
    """
    scaled = weights.detach() / weights.detach().max()  # squares of huge weights overflow
    return scaled.sum().square() / scaled.square().sum()


def truncated_fraction(
    weights: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], truncate_at: float
) -> Float[Tensor, ""]:
    """Share of the real tokens whose weight (not truncated) exceeds c, `truncate_at`.

    Example:
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> truncated_fraction(torch.tensor([[1.0, 1.5, 2.5, 9.0]]), mask, 2.0)
        tensor(0.3333)
    """
    return (weights.detach() > truncate_at)[mask].to(weights.dtype).mean()


def prefix_weighted_surrogate(
    k: Float[Tensor, "B T"],
    policy_token_logp: Float[Tensor, "B T"],
    sampler_token_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    own_token: bool,
    truncate_at: float | None = None,
) -> Float[Tensor, " B"]:
    """Σ_t W_t k_t per response, whose mean over μ is the KL and whose gradient its gradient.

    With `own_token`, k depends on y_t and W includes r_t. Differentiates k *and* the weights: not a
    surrogate only, the value is the off-policy estimate of D_KL(policy ‖ ref) itself, in nats per
    response. Unbiased in both, of the *sequence* KL, for rb (`own_token=False`) and, with the
    token's own ratio, for every unbiased function k of u_t (`own_token=True`).

    Raises:
        ValueError: `truncate_at` is below 1.

    Example:
        >>> logp, sampler = torch.tensor([[0.2, 0.5]]).log(), torch.tensor([[0.4, 0.5]]).log()
        >>> k, mask = torch.tensor([[0.3, 0.2]]), torch.ones(1, 2, dtype=torch.bool)
        >>> prefix_weighted_surrogate(k, logp, sampler, mask, own_token=False)
        tensor([0.4000])
    """
    logps = policy_token_logp, sampler_token_logp, mask
    weights = prefix_weights(*logps, own_token=own_token, truncate_at=truncate_at)
    return _weighted(weights, k, mask).sum(1)


class PrefixChannels(NamedTuple):
    """The gradient of `prefix_weighted_surrogate` in two parts, constants to multiply with."""

    pathwise: Float[Tensor, "B T"]
    """W_t, the weight of ∇k_t."""
    future: Float[Tensor, "B T"]
    """Σ_{s>t} W_s k_s (s ≥ t with `own_token`), the weight of g_t = ∇log π(y_t|h_t); nats."""


def prefix_channels(
    k: Float[Tensor, "B T"],
    policy_token_logp: Float[Tensor, "B T"],
    sampler_token_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    own_token: bool,
    truncate_at: float | None = None,
) -> PrefixChannels:
    """What a trainer needs that walks over tokens: ∇ = Σ_t W_t ∇k_t + Σ_t g_t Σ_{s>t} W_s k_s.

    Detached; 0 where masked. With π = μ these are 1 and `future_kl`. Arguments are those of
    `prefix_weighted_surrogate`, whose gradient the sum of both parts is.

    Example:
        >>> logp, sampler = torch.tensor([[0.2, 0.5]]).log(), torch.tensor([[0.4, 0.5]]).log()
        >>> k, mask = torch.tensor([[0.3, 0.2]]), torch.ones(1, 2, dtype=torch.bool)
        >>> prefix_channels(k, logp, sampler, mask, own_token=False)
        PrefixChannels(pathwise=tensor([[1.0000, 0.5000]]), future=tensor([[0.1000, 0.0000]]))
    """
    logps = policy_token_logp, sampler_token_logp, mask
    weights = prefix_weights(*logps, own_token=own_token, truncate_at=truncate_at).detach()
    weighted = _weighted(weights, k, mask)
    return PrefixChannels(torch.where(mask, weights, 0.0), future_kl(weighted, mask, own_token))


def token_ratio_surrogate(
    k: Float[Tensor, "B T"],
    policy_token_logp: Float[Tensor, "B T"],
    sampler_token_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, " B"]:
    """Σ_t r_t k_t per response, k and r_t differentiated: the token's own ratio only.

    The form of the field (k3 × ratio in the loss). For any unbiased k that is a function of u_t its
    expectation is Σ_t E_{h~μ}[D_t], the token KL of π at the prefixes that *μ* visits, and its
    gradient the token-level gradient there. At π = μ that is Σ_t E[∇D_t]: how a token changes the
    KL of later prefixes is left out.

    Example:
        >>> logp = torch.tensor([[0.2, 0.5]]).log()
        >>> k, mask = torch.tensor([[0.3, 0.2]]), torch.ones(1, 2, dtype=torch.bool)
        >>> token_ratio_surrogate(k, logp, torch.tensor([[0.4, 0.5]]).log(), mask)
        tensor([0.3500])
    """
    ratios = token_ratios(policy_token_logp, sampler_token_logp, mask)
    return _weighted(ratios, k, mask).sum(1)


def _weighted(weights: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Weights · k, 0 where masked and where the weight is 0: there k may be nan or infinite."""
    check_per_token(mask, k=k)
    return weights * torch.where(mask & (weights != 0), k, 0.0)


def _log_ratio(policy_token_logp: Tensor, sampler_token_logp: Tensor, mask: Tensor) -> Tensor:
    """Log r_t, 0 where masked; -inf where the policy has none, whatever the sampler, a constant."""
    check_per_token(
        mask, policy_token_logp=policy_token_logp, sampler_token_logp=sampler_token_logp
    )
    policy = torch.where(mask, policy_token_logp, 0.0)
    sampler = torch.where(mask & (policy > -torch.inf), sampler_token_logp, 0.0)
    return policy - sampler.detach()


def _exp(log_weights: Tensor, truncate_at: float | None) -> Tensor:
    """min(W, c), whose gradient is that of W scaled down to c: the score-function term stays."""
    if truncate_at is None:
        return log_weights.exp()
    if truncate_at < 1:
        raise ValueError(
            f"truncate_at is {truncate_at}; it must be at least 1, the weight of a response on "
            "which both policies agree"
        )
    excess = (log_weights - math.log(truncate_at)).clamp(min=0)
    return (log_weights - excess.detach()).exp()
