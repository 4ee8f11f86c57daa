"""One distribution fitted to another by gradient descent on a divergence: where does it fit first?

The policy is a table of logits, so nothing but the divergence decides. Forward and reverse KL have
the same optimum, and with enough steps both reach it; what differs is the way there.

Reference: Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
Models (Wu et al., 2024), https://arxiv.org/abs/2404.02657, whose toy data these targets follow.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlkl.kl.adaptive import HeadRule, reference_head


class Fit(NamedTuple):
    """The course of a fit: entry s is after s steps, entry 0 is the start."""

    head_error: Float[Tensor, " S"]
    """Σ |q_v - π_v| over the target's head."""
    tail_error: Float[Tensor, " S"]
    """Σ |q_v - π_v| over the rest."""
    policies: Float[Tensor, "S V"]
    """The policy's probabilities."""


def gaussian_mixture(
    size: int = 100,
    centres: tuple[float, ...] = (0.3, 0.7),
    widths: tuple[float, ...] = (0.04, 0.12),
    weights: tuple[float, ...] = (0.6, 0.4),
) -> Float[Tensor, " V"]:
    """Log-probabilities of a mixture of Gaussians on `size` points of [0, 1], made to sum to 1.

    Example:
        >>> gaussian_mixture(5, (0.5,), (0.25,), (1.0,)).exp()
        tensor([0.0545, 0.2442, 0.4026, 0.2442, 0.0545])
    """
    x = torch.linspace(0, 1, size)
    density = torch.zeros(size)
    for centre, width, weight in zip(centres, widths, weights, strict=True):
        density = density + weight * torch.exp(-((x - centre) ** 2) / (2 * width**2)) / width
    return (density / density.sum()).log()


def long_tail(size: int = 100, exponent: float = 1.2) -> Float[Tensor, " V"]:
    """Log-probabilities ∝ -exponent · log rank: Zipf's law, as of next tokens.

    Example:
        >>> long_tail(3, 1.0).exp()  # 6, 3 and 2 parts of 11
        tensor([0.5455, 0.2727, 0.1818])
    """
    return (-exponent * torch.arange(1.0, size + 1).log()).log_softmax(0)


def fit_policy(
    target_logp: Float[Tensor, " V"],
    divergence: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    learning_rate: float,
    *,
    start_logits: Float[Tensor, " V"] | None = None,
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
) -> Fit:
    """Gradient descent on divergence(policy_logits, target_logp) in the policy's logits.

    Args:
        target_logp: log-probabilities of the target.
        divergence: a divergence of `rlkl.kl`, in the order (policy, target).
        steps: plain steps, logits ← logits - learning_rate · ∇.
        learning_rate: the same at every step.
        start_logits: where to begin; None: the uniform distribution.
        head_mass: the target's probability that makes its head.
        head_rule: which tokens that is; see `rlkl.kl.adaptive`.

    Example:
        >>> from rlkl.kl import forward_kl
        >>> fit = fit_policy(torch.tensor([0.8, 0.2]).log(), forward_kl, 100, 1.0)
        >>> print(f"{fit.head_error[0]:.3f} -> {fit.head_error[-1]:.3f}")
        0.300 -> 0.000
    """
    start = torch.zeros_like(target_logp) if start_logits is None else start_logits
    logits = start.clone().requires_grad_()
    target, head = target_logp.exp(), reference_head(target_logp, head_mass, head_rule)
    policies = [logits.detach().softmax(0)]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(divergence(logits, target_logp), logits)
        with torch.no_grad():
            logits -= learning_rate * gradient
        policies.append(logits.detach().softmax(0))
    course = torch.stack(policies)
    gap = (course - target).abs()
    return Fit(gap[:, head].sum(1), gap[:, ~head].sum(1), course)
