"""The passes over a chunk's logits as torch's operations: for blocks of rows that fit the cache.

In float64, and where neither Numba (CPU) nor Triton (GPU) is installed.
"""

import torch
from torch import Tensor

# Below this many nats, eᵗ − t − 1 by subtraction has lost the digits that count.
_NEAR = 5e-4


def read_rows(p: Tensor, t: Tensor | None, rows: dict[str, Tensor], *, with_phi: bool) -> None:
    """Logits [n, V] of policy and reference -> p, t and the sums per row [n, 1], all in place.

    Without `with_phi` Σ p φ(t) is left out, and t_max only says whether the mean of t is finite.
    """
    x = torch.empty_like(p)
    if t is not None:
        equal = t == p  # −∞ in both models as well
        t.sub_(p).masked_fill_(equal, 0)
    peak, p_sum, mean = rows["peak"], rows["p_sum"], rows["t_mean"]
    torch.amax(p, 1, keepdim=True, out=peak)
    peak.clamp_(min=torch.finfo(p.dtype).min)  # where every logit is −∞
    torch.exp(torch.sub(p, peak, out=x), out=p)
    torch.sum(p, 1, keepdim=True, out=p_sum)
    torch.nansum(x.mul_(p), 1, keepdim=True, out=rows["a_sum"])  # 0 · log 0 = 0
    if t is None:
        return
    torch.sum(torch.mul(p, t, out=x), 1, keepdim=True, out=mean)
    t.sub_(mean.div_(p_sum.clamp(min=1)))  # the largest p is 1, if any token is allowed
    torch.sum(torch.mul(p, t, out=x), 1, keepdim=True, out=rows["t_sum"])
    if not with_phi:
        torch.sub(mean, mean, out=rows["t_max"])  # NaN marks rows with −inf
        return
    torch.amax(t, 1, keepdim=True, out=rows["t_max"])
    torch.exp(t, out=x).sub_(t).sub_(1).mul_(p)
    phi_sum = torch.sum(x, 1, keepdim=True, out=rows["phi_sum"])
    near = (phi_sum < _NEAR * p_sum)[:, 0].nonzero()[:, 0]
    if len(near):
        phi_sum[near] = _small_phi_sum(p[near], t[near])


def _small_phi_sum(p: Tensor, t: Tensor) -> Tensor:
    """Σ p (eᵗ − 1 − t) [n, 1] with all its digits, however small t is."""
    # expm1(t) = tanh(t/2)(eᵗ + 1) keeps every digit near 0, in a quarter of expm1's time.
    expm1 = (t * 0.5).tanh_().mul_(t.exp().add_(1))
    return expm1.sub_(t).mul_(p).sum(1, keepdim=True)


def gradient_rows(
    p: Tensor,
    t: Tensor | None,
    slope: Tensor | None,
    tokens: Tensor,
    constant: Tensor,
    t_factor: Tensor | None,
    log_factor: Tensor | None,
    token_gradient: Tensor | None,
) -> None:
    """(p ⊙ (constant + t_factor t + log_factor log p) + onehot token_gradient) ⊙ slope, in p.

    t is overwritten.
    """
    factor = constant
    if t is not None and t_factor is not None:
        factor = t.mul_(t_factor).add_(factor)
    if log_factor is not None:
        factor = _log_of(p).mul_(log_factor).add_(factor)
    p.mul_(factor)
    if token_gradient is not None:
        p.scatter_add_(1, tokens, token_gradient)
    if slope is not None:
        p.mul_(slope)


def _log_of(p: Tensor) -> Tensor:
    """Log p, finite at p = 0, so that p log p is 0 there."""
    return torch.clamp(p, min=torch.finfo(p.dtype).tiny).log_()
