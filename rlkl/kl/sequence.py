"""From per-token estimates to the numbers reported: nats per response or per token, ± error.

Standard errors treat the B responses as independent draws. Responses that share a prompt are so
given that prompt: for an interval over prompts, average each prompt's responses first.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class MeanStderr(NamedTuple):
    """A mean with its standard error; both 0-d tensors in the unit of what was averaged."""

    mean: Float[Tensor, ""]
    stderr: Float[Tensor, ""]


def sequence_kl(k: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Σ_t k_t over the real tokens of each response, in nats per response.

    An estimate of D_KL(policy ‖ ref) of the whole response; where responses are cut at L tokens,
    of its first L steps. Differentiable in `k`, which holds prefixes fixed: for ∇D_KL use
    `kl_surrogate`.

    Example:
        >>> k, mask = torch.tensor([[0.5, 0.25, torch.nan]]), torch.tensor([[True, True, False]])
        >>> sequence_kl(k, mask)
        tensor([0.7500])
    """
    return torch.where(mask, k, 0.0).sum(1)


def mean_and_stderr(x: Float[Tensor, " B"]) -> MeanStderr:
    """Mean of B independent values and its standard error, s / √B with s² over B - 1.

    One value says nothing of the spread: its standard error is inf, not nan, so that an interval
    built on it is the whole line.

    Raises:
        ValueError: `x` is empty.

    Example:
        >>> mean_and_stderr(torch.tensor([1.0, 3.0]))
        MeanStderr(mean=tensor(2.), stderr=tensor(1.))
    """
    if len(x) == 0:
        raise ValueError("x is empty; a mean needs at least one response")
    if len(x) == 1:
        return MeanStderr(x[0], torch.full_like(x[0], torch.inf))
    return MeanStderr(x.mean(), x.std() / len(x) ** 0.5)


def per_token_mean_and_stderr(k: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> MeanStderr:
    """Mean over all real tokens, R = Σ_b S_b / Σ_b L_b, in nats per token, with its standard error.

    S_b is the sum and L_b the length of response b. Tokens of one response are not independent,
    and lengths vary: the error is that of a ratio of two means over responses (delta method),

        stderr = √( B/(B-1) · Σ_b (S_b - R·L_b)² ) / Σ_b L_b;

    inf for a single response, as in `mean_and_stderr`.

    Raises:
        ValueError: `mask` has no True.

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
    if len(k) == 1:
        return MeanStderr(mean, torch.full_like(mean, torch.inf))
    residual = total - mean * length
    return MeanStderr(mean, (residual.square().sum() * len(k) / (len(k) - 1)).sqrt() / tokens)
