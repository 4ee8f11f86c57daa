"""From per-token estimates to the numbers reported: nats per response or per token, ± error.

Standard errors treat the B responses as independent draws, unless `groups` says which of them share
a prompt: those are alike, and the error is then that over prompts (clustered by prompt).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.shapes import check_per_token


class MeanStderr(NamedTuple):
    """A mean with its standard error; both 0-d tensors in the unit of what was averaged."""

    mean: Float[Tensor, ""]
    stderr: Float[Tensor, ""]


def sequence_kl(k: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Σ_t k_t over the real tokens of each response, in nats per response.

    An estimate of D_KL(policy ‖ ref) of the whole response; where responses are cut at L tokens,
    of its first L steps. Differentiable in `k`, which holds prefixes fixed: for ∇D_KL use
    `kl_surrogate`.

    Raises:
        ValueError: the shapes differ, or `mask` is not bool.

    Example:
        >>> k, mask = torch.tensor([[0.5, 0.25, torch.nan]]), torch.tensor([[True, True, False]])
        >>> sequence_kl(k, mask)
        tensor([0.7500])
    """
    check_per_token(mask, k=k)
    return torch.where(mask, k, 0.0).sum(1)


def mean_and_stderr(x: Float[Tensor, " B"], groups: Int[Tensor, " B"] | None = None) -> MeanStderr:
    """Mean of B values and its standard error, s / √B with s² over B - 1.

    With `groups` the G sums of deviations within a group are what is independent:

        stderr = √( G/(G-1) · Σ_g (Σ_{b∈g} (x_b - mean))² ) / B,

    the same where every group has one member. One value or group says nothing of the spread: its
    standard error is inf, not nan, so that an interval built on it is the whole line.

    Raises:
        ValueError: `x` is empty, or not [B]; `groups` is not [B].

    Example:
        >>> mean_and_stderr(torch.tensor([1.0, 3.0]))
        MeanStderr(mean=tensor(2.), stderr=tensor(1.))
        >>> mean_and_stderr(torch.tensor([1.0, 1.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1]))
        MeanStderr(mean=tensor(2.), stderr=tensor(1.))
    """
    if x.ndim != 1 or (groups is not None and groups.shape != x.shape):
        given = "" if groups is None else f", groups {tuple(groups.shape)}"
        raise ValueError(
            f"x has shape {tuple(x.shape)}{given}: pass one value per response, [B] (sequence_kl "
            "adds those of its tokens, per_token_mean_and_stderr has the mean of tokens)"
        )
    if len(x) == 0:
        raise ValueError("x is empty; a mean needs at least one response")
    mean = x.mean()
    return MeanStderr(mean, _sum_stderr(x - mean, groups) / len(x))


def per_token_mean_and_stderr(
    k: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], groups: Int[Tensor, " B"] | None = None
) -> MeanStderr:
    """Mean over all real tokens, R = Σ_b S_b / Σ_b L_b, in nats per token, with its standard error.

    S_b is the sum and L_b the length of response b. Tokens of one response are not independent,
    and lengths vary: the error is that of a ratio of two means over responses (delta method),

        stderr = √( B/(B-1) · Σ_b (S_b - R·L_b)² ) / Σ_b L_b;

    with `groups`, of the residuals' sums per group; inf for a single one, as in `mean_and_stderr`.

    Raises:
        ValueError: `mask` has no True, or is not bool; the shapes differ.

    Example:
        >>> k = torch.tensor([[1.0, 1.0], [4.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> mean, stderr = per_token_mean_and_stderr(k, mask)
        >>> print(f"{mean:.4f} ± {stderr:.4f}")  # 6 nats on 3 tokens
        2.0000 ± 1.3333
    """
    total, length = sequence_kl(k, mask), mask.sum(1)
    tokens = length.sum()
    if tokens == 0:
        raise ValueError("mask has no True; a mean per token needs at least one response token")
    mean = total.sum() / tokens
    return MeanStderr(mean, _sum_stderr(total - mean * length, groups) / tokens)


def _sum_stderr(
    residual: Float[Tensor, " B"], groups: Int[Tensor, " B"] | None
) -> Float[Tensor, ""]:
    """Standard error of a sum from its residuals, whose sum is 0: √( G/(G-1) · Σ_g r_g² )."""
    if groups is not None:
        index = groups.unique(return_inverse=True)[1]
        residual = residual.new_zeros(int(index.max()) + 1).index_add(0, index, residual)
    count = len(residual)
    if count == 1:
        return torch.full_like(residual[0], torch.inf)
    return (residual.square().sum() * count / (count - 1)).sqrt()
