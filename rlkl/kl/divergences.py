"""Divergences between two next-token distributions, in nats per position, from their logits.

The names say the direction from the policy's side, whatever is being trained (in distillation
the student is the policy and the teacher the reference):

    reverse_kl      D_KL(policy ‖ ref) = Σ_v π_v (log π_v - log q_v)       mode-seeking
    forward_kl      D_KL(ref ‖ policy) = Σ_v q_v (log q_v - log π_v)       mass-covering
    jensen_shannon  ½ D_KL(policy ‖ m) + ½ D_KL(ref ‖ m),   m = ½ (π + q)  symmetric, at most log 2

All sums run over the last axis. All take `[..., V]` logits (log-probabilities are logits too) and
return `[...]`; all are differentiable in both arguments. Log-softmax and sums are in float32, or
float64 if an input is.

Numerics. With d = log p - log q, every Kullback-Leibler sum here is computed as

    D_KL(p ‖ q) = Σ_v p_v d_v + Σ_v p_v expm1(-d_v),

where the second sum is Σ (q - p) = 0. Each term is now ≥ 0 and O(d²), so a rounding error in a
normaliser enters squared: the result is never negative, exactly 0 (gradient too) for identical
logits, and keeps its digits where Σ p·d alone is all rounding. Logits of -inf mean probability 0:
0 · log 0 = 0, and p > 0 = q makes a Kullback-Leibler divergence +inf (its gradient is then not
finite either), while Jensen-Shannon stays finite.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def reverse_kl(
    policy_logits: Float[Tensor, "*batch V"], ref_logits: Float[Tensor, "*batch V_ref"]
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
    return reverse_kl_terms(policy_logits, ref_logits).sum(-1)


def reverse_kl_terms(
    policy_logits: Float[Tensor, "*batch V"], ref_logits: Float[Tensor, "*batch V_ref"]
) -> Float[Tensor, "*batch V"]:
    """What each token adds to D_KL(policy ‖ ref): π_v log(π_v / q_v) - π_v + q_v, in nats.

    Never negative, whether the policy raised the token or lowered it, and the sum over the
    vocabulary is `reverse_kl`, since Σ_v (q_v - π_v) = 0.

    Returns:
        `[..., V]`, ≥ 0; +inf where the policy gives mass to a token the reference excludes.

    Raises:
        ValueError: the vocabularies differ in size.

    Example:
        >>> policy, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> reverse_kl_terms(policy, ref)
        tensor([0.0966, 0.0473])
    """
    policy_logp, ref_logp = _log_softmax_pair(policy_logits, ref_logits)
    return _kl_terms(policy_logp.exp(), policy_logp - ref_logp, ref_logp.exp())


def forward_kl(
    policy_logits: Float[Tensor, "*batch V"], ref_logits: Float[Tensor, "*batch V_ref"]
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
    policy_logp, ref_logp = _log_softmax_pair(policy_logits, ref_logits)
    return _kl(ref_logp, policy_logp)


def jensen_shannon(
    policy_logits: Float[Tensor, "*batch V"], ref_logits: Float[Tensor, "*batch V_ref"]
) -> Float[Tensor, "*batch"]:
    """½ D_KL(policy ‖ m) + ½ D_KL(ref ‖ m) with m = ½ (π + q), at each position, in nats.

    Returns:
        `[...]`, in [0, log 2]: symmetric, and finite whatever tokens either side excludes.

    Raises:
        ValueError: the vocabularies differ in size.

    Example:
        >>> policy, ref = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
        >>> print(f"{jensen_shannon(policy, ref):.4f}")  # disjoint supports: log 2
        0.6931
    """
    policy_logp, ref_logp = _log_softmax_pair(policy_logits, ref_logits)
    p, q = policy_logp.exp(), ref_logp.exp()
    d = torch.where((p == 0) & (q == 0), 0.0, policy_logp - ref_logp)
    # p/m = 2/(1 + e^-d) and q/m = 2/(1 + e^d): by |d| neither overflows nor loses digits.
    log_mean = torch.log1p(torch.expm1(-d.abs()) / 2)
    m = (p + q) / 2
    policy_terms = _kl_terms(p, d.clamp(max=0) - log_mean, m)
    ref_terms = _kl_terms(q, (-d).clamp(max=0) - log_mean, m)
    return (policy_terms + ref_terms).sum(-1) / 2


def _log_softmax_pair(policy_logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of both in their common type, at least float32, once their sizes agree."""
    vocab_size, ref_vocab_size = policy_logits.shape[-1], ref_logits.shape[-1]
    if vocab_size != ref_vocab_size:
        raise ValueError(
            f"policy_logits has a vocabulary of {vocab_size} and ref_logits of {ref_vocab_size}: "
            "if one is only padded, cut both to the tokenizer's size, logits[..., :vocab_size]; "
            "models with different tokenizers have no KL"
        )
    dtype = torch.promote_types(policy_logits.dtype, ref_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return (
        torch.log_softmax(policy_logits.to(dtype), -1),
        torch.log_softmax(ref_logits.to(dtype), -1),
    )


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """D_KL(p ‖ q) over the last axis, of log-probabilities."""
    return _kl_terms(logp.exp(), logp - logq, logq.exp()).sum(-1)


def _kl_terms(p: Tensor, log_ratio: Tensor, q: Tensor) -> Tensor:
    """p·r + (q - p) ≥ 0 with r = log(p/q), summing to D_KL(p ‖ q) as both p and q sum to 1."""
    log_ratio = torch.where(p == 0, 0.0, log_ratio)  # 0 · log 0 = 0, in the gradient too
    # Where p ≪ q, expm1(-r) would overflow and q - p cancels nothing: each form in its range.
    difference = torch.where(
        (log_ratio < -1) | (p == 0), q - p, p * torch.expm1(-log_ratio.clamp(min=-1))
    )
    return p * log_ratio + difference
