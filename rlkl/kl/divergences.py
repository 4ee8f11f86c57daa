"""Divergences between two next-token distributions, in nats per position, from their logits.

The names say the direction from the policy's side, whatever is being trained (in distillation
the student is the policy and the teacher the reference):

    reverse_kl          D_KL(policy ‖ ref) = Σ_v π_v (log π_v - log q_v)       mode-seeking
    forward_kl          D_KL(ref ‖ policy) = Σ_v q_v (log q_v - log π_v)       mass-covering
    forward_reverse_kl  w forward_kl + (1 - w) reverse_kl
    jensen_shannon      w D_KL(ref ‖ m) + (1 - w) D_KL(policy ‖ m),   m = w q + (1 - w) π
    skew_kl             D_KL(ref ‖ α q + (1 - α) π)                            at most log 1/α
    skew_reverse_kl     D_KL(policy ‖ α π + (1 - α) q)                         at most log 1/α

(`adaptive_kl`, which weighs the first two by where they differ, is in `rlkl.kl.adaptive`.) All sums
run over the last axis. All take `[..., V]` logits (log-probabilities are logits too) and return
`[...]`. The gradient flows to the policy's logits only; the reference is treated as constant.
Log-softmax and sums are in float32, or float64 if an input is.

Temperature. Both logits are divided by `temperature` first, and what is returned is the divergence
of those two distributions, in nats. In distillation the *loss* is temperature² times that (Hinton,
Vinyals and Dean, 2015, https://arxiv.org/abs/1503.02531, section 2.1): gradients shrink by 1/T² as
T grows, and the factor keeps their size. The factor is the loss's (`rlkl.kl.distillation_loss`),
never the measured value's.

Numerics. With d = log p - log q, every Kullback-Leibler sum here is computed as

    D_KL(p ‖ q) = Σ_v p_v d_v + Σ_v p_v expm1(-d_v),

where the second sum is Σ (q - p) = 0. Each term is now ≥ 0 and O(d²), so a rounding error in a
normaliser enters squared: the result is never negative, exactly 0 (gradient too) for identical
logits, and keeps its digits where Σ p·d alone is all rounding. Logits of -inf mean probability 0:
0 · log 0 = 0, and p > 0 = q makes a Kullback-Leibler divergence +inf (its gradient is then not
finite either), while Jensen-Shannon and the skewed ones stay finite.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def reverse_kl(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """D_KL(policy ‖ ref) = Σ_v π_v (log π_v - log q_v) at each position, in nats.

    As a function of the prefix this is the exact token KL, D_t, of `rlkl.kl.estimators`.

    Returns:
        `[...]`, ≥ 0; +inf where the policy gives mass to a token the reference excludes.

    Raises:
        ValueError: the vocabularies differ in size.

    Example:
        >>> policy, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> print(f"{reverse_kl(policy, ref):.4f}")  # ½ log 2 + ½ log ⅔
        0.1438
    """
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    return kl_of_logp(policy_logp, ref_logp)


def forward_kl(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """D_KL(ref ‖ policy) = Σ_v q_v (log q_v - log π_v) at each position, in nats.

    Its gradient in the policy is that of the cross-entropy to the reference: -Σ_v q_v ∇log π_v.

    Returns:
        `[...]`, ≥ 0; +inf where the reference gives mass to a token the policy excludes.

    Raises:
        ValueError: the vocabularies differ in size.

    Example:
        >>> policy, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> print(f"{forward_kl(policy, ref):.4f}")  # ¼ log ½ + ¾ log 1½
        0.1308
    """
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    return kl_of_logp(ref_logp, policy_logp)


def forward_reverse_kl(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    weight: float = 0.5,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Weight · D_KL(ref ‖ policy) + (1 - weight) · D_KL(policy ‖ ref) at each position, in nats.

    Raises:
        ValueError: the vocabularies differ in size; `weight` is not in [0, 1].

    Example:
        >>> policy, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> print(f"{forward_reverse_kl(policy, ref):.4f}")  # ½ (0.1308 + 0.1438)
        0.1373
    """
    _check_share("weight", weight)
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    if weight in (0.0, 1.0):  # an infinite part of no weight does not count
        parts = (ref_logp, policy_logp) if weight else (policy_logp, ref_logp)
        return kl_of_logp(*parts)
    forward, reverse = kl_of_logp(ref_logp, policy_logp), kl_of_logp(policy_logp, ref_logp)
    return weight * forward + (1 - weight) * reverse


def jensen_shannon(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    weight: float = 0.5,
    *,
    scaled: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """JS(w) = w D_KL(ref ‖ m) + (1 - w) D_KL(policy ‖ m), m = w q + (1 - w) π, in nats.

    At w = ½ the Jensen-Shannon divergence. Continuous in w on the whole of [0, 1]: it falls to 0 at
    both ends, in proportion to w(1 - w). Divided by that (`scaled`) it runs from forward_kl at w = 0
    to reverse_kl at w = 1, both ends included.

    Reference: On-Policy Distillation of Language Models (Agarwal et al., 2023),
    https://arxiv.org/abs/2306.13649, where w is β, the teacher's weight in the mixture. (Code that
    takes forward or reverse KL at w = 0 and 1 and the unscaled form between them jumps there.)

    Args:
        policy_logits: `[..., V]`.
        ref_logits: `[..., V]`, constant.
        weight: w, the reference's share of the mixture.
        scaled: divide by w(1 - w).
        temperature: divides both logits.

    Returns:
        `[...]`: at w = ½ in [0, log 2], symmetric, and finite whatever tokens either side excludes.

    Raises:
        ValueError: the vocabularies differ in size; `weight` is not in [0, 1].

    Example:
        >>> policy, ref = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
        >>> print(f"{jensen_shannon(policy, ref):.4f}")  # disjoint supports: log 2
        0.6931
    """
    _check_share("weight", weight)
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    if weight in (0.0, 1.0):
        end = (policy_logp, ref_logp) if weight else (ref_logp, policy_logp)
        return kl_of_logp(*end) if scaled else policy_logp.exp().sum(-1) * 0
    ref_part = _kl_to_mixture(ref_logp, policy_logp, weight)
    policy_part = _kl_to_mixture(policy_logp, ref_logp, 1 - weight)
    if scaled:
        return ref_part / (1 - weight) + policy_part / weight
    return weight * ref_part + (1 - weight) * policy_part


def skew_kl(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    alpha: float = 0.1,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """D_KL(ref ‖ α q + (1 - α) π) at each position, in nats: forward KL to a policy helped by α.

    α = 0 is `forward_kl`; the larger α, the flatter.

    Reference: DistiLLM (Ko et al., 2024), https://arxiv.org/abs/2402.03898.

    Returns:
        `[...]`, in [0, log 1/α].

    Raises:
        ValueError: the vocabularies differ in size; `alpha` is not in [0, 1).

    Example:
        >>> policy, ref = torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0])
        >>> print(f"{skew_kl(policy, ref, 0.5):.4f}")  # D_KL(½, ½ ‖ ¾, ¼); forward_kl is inf
        0.1438
    """
    _check_share("alpha", alpha, below_one=True)
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    return _kl_to_mixture(ref_logp, policy_logp, alpha)


def skew_reverse_kl(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    alpha: float = 0.1,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """D_KL(policy ‖ α π + (1 - α) q) at each position, in nats: reverse KL, bounded.

    α = 0 is `reverse_kl`.

    Reference: DistiLLM (Ko et al., 2024), https://arxiv.org/abs/2402.03898.

    Returns:
        `[...]`, in [0, log 1/α].

    Raises:
        ValueError: the vocabularies differ in size; `alpha` is not in [0, 1).

    Example:
        >>> policy, ref = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])
        >>> print(f"{skew_reverse_kl(policy, ref, 0.5):.4f}")  # reverse_kl is inf
        0.1438
    """
    _check_share("alpha", alpha, below_one=True)
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    return _kl_to_mixture(policy_logp, ref_logp, alpha)


def log_softmax_pair(
    policy_logits: Tensor, ref_logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-softmax of both in their common type, at least float32, once their sizes agree.

    The second is detached: here ends the gradient of the reference.
    """
    vocab_size, ref_vocab_size = policy_logits.shape[-1], ref_logits.shape[-1]
    if vocab_size != ref_vocab_size:
        raise ValueError(
            f"policy_logits has a vocabulary of {vocab_size} and ref_logits of {ref_vocab_size}: "
            "if one is only padded, cut both to the tokenizer's size, logits[..., :vocab_size]; "
            "models with different tokenizers have no KL"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be positive and finite")
    dtype = torch.promote_types(policy_logits.dtype, ref_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return (
        torch.log_softmax(policy_logits.to(dtype) / temperature, -1),
        torch.log_softmax(ref_logits.detach().to(dtype) / temperature, -1),
    )


def kl_of_logp(logp: Tensor, logq: Tensor) -> Tensor:
    """D_KL(p ‖ q) over the last axis, of log-probabilities."""
    return _kl_terms(logp.exp(), logp - logq, logq.exp()).sum(-1)


def _kl_to_mixture(logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    """D_KL(p ‖ m) with m = αp + (1 - α)q over the last axis; 0 ≤ α < 1."""
    if alpha == 0:
        return kl_of_logp(logp, logq)
    p, q = logp.exp(), logq.exp()
    d = torch.where((p == 0) & (q == 0), 0.0, logp - logq)
    # p/m = 1/(α + (1 - α)e^-d) = e^d/(1 - α + αe^d): by |d| neither overflows nor loses digits.
    shrink = torch.expm1(-d.abs())
    log_ratio = torch.where(
        d > 0, -torch.log1p((1 - alpha) * shrink), d - torch.log1p(alpha * shrink)
    )
    return _kl_terms(p, log_ratio, alpha * p + (1 - alpha) * q).sum(-1)


def _kl_terms(p: Tensor, log_ratio: Tensor, q: Tensor) -> Tensor:
    """p·r + (q - p) ≥ 0 with r = log(p/q), summing to D_KL(p ‖ q) as both p and q sum to 1."""
    log_ratio = torch.where(p == 0, 0.0, log_ratio)  # 0 · log 0 = 0, in the gradient too
    # Where p ≪ q, expm1(-r) would overflow and q - p cancels nothing: each form in its range.
    difference = torch.where(
        (log_ratio < -1) | (p == 0), q - p, p * torch.expm1(-log_ratio.clamp(min=-1))
    )
    return p * log_ratio + difference


def _check_share(name: str, value: float, below_one: bool = False) -> None:
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise ValueError(f"{name}={value}: must lie in [0, 1{')' if below_one else ']'}")
