"""Divergences other than D_KL(policy ‖ ref), read off a block of rows while it is in the cache.

With p the policy's softmax and s = log q − log p, a divergence is Σ p f(s) and its gradient with
respect to the policy's logits is −p ⊙ X, where X = E_p[g] − g and g = f − df/ds:

    fkl       Σ p (s eˢ − expm1 s)                  X = expm1 s
    rkl       Σ p (expm1 s − s)                     X = s + D_KL(policy ‖ ref)
    js        Σ p (w s eˢ − L (1 + w expm1 s))      X = (1 − w) (L − E_p[L])
    skew_fkl  Σ p (eˢ (s − L) − (1 − α) expm1 s)    X = (1 − α) (r − E_p[r])
    skew_rkl  Σ p ((1 − α) expm1 s − L)             X = L + r − E_p[L + r]

    js        L = log(1 + w expm1 s)
    skew_fkl  L = log(1 + α expm1 s),               r = (1 − α) expm1 s / (1 + α expm1 s)
    skew_rkl  L = log(1 + (1 − α) expm1 s),         r = −α (1 − α) expm1 s / (1 + (1 − α) expm1 s)

Every term of the sums is O(s²), and an error of the normaliser enters squared; see the package.

A token that the policy forbids adds the limit of p f(s) as p goes to 0, q lim f(s) e⁻ˢ:

    rkl  q        js  −w log w q        skew_fkl  (α − 1 − log α) q        skew_rkl  (1 − α) q

and forward KL is infinite. To the gradient it adds nothing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.kl.distillation import Divergence, get_divergence
from rlkl.kl.divergences import log_softmax_pair

# Stands for probabilities that underflow where they must carry a gradient.
SMALLEST_P = 1e-30
# First try at the reference's most likely tokens; rows whose head may be larger are sorted whole.
_LIKELY = 256


class Rows(NamedTuple):
    """A block of rows: p unnormalised, t = s + kl + t_mean; kl = D_KL(policy ‖ ref)."""

    p: Tensor  # [n, V]
    p_sum: Tensor  # [n, 1]
    t: Tensor  # [n, V]
    t_mean: Tensor  # [n, 1], what rounding left
    kl: Tensor  # [n, 1]
    tokens: Tensor  # [n, 1]
    scratch: tuple[Tensor, ...]  # three of [n, V]

    def mean(self, f: Tensor) -> Tensor:
        """E_p[f], [n, 1]; overwrites the last scratch block."""
        return torch.mul(self.p, f, out=self.scratch[2]).sum(1, keepdim=True).div_(self.p_sum)


class TopK(NamedTuple):
    """Σ_{v ∈ S} p_v u_v + 1[y ∉ S] u_y with u = log p − log q: exact on S, the k likeliest tokens.

    Only with tokens y sampled from the policy: then value and gradient (S held fixed) are unbiased.
    """

    k: int = 20


class RowDivergence(NamedTuple):
    """A divergence of rows, and of rows given as whole logits (where p underflows)."""

    read: Callable[[Rows, bool], Tensor] | None
    """(rows, differentiate) -> [n, 1], with X left in t if differentiate. None: D_KL(policy ‖ ref),
    which the engine has already, X = t."""
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Logits [n, V] of policy and reference, tokens [n, 1] -> [n]; differentiable."""
    gain: float | None
    """Its gain per unit of the reference's probability of tokens that the policy forbids, which
    `read` does not see. None: it may be infinite."""


def row_divergence(divergence: str | Divergence | TopK) -> RowDivergence:
    """The divergence of that name (or with those settings) for the fused sweep.

    Raises:
        ValueError: unknown name, or a setting out of range.
    """
    if isinstance(divergence, TopK):
        return _topk(divergence.k)
    whole = get_divergence(divergence) if isinstance(divergence, str) else divergence
    name, settings = whole.name, whole.settings
    weight, alpha = float(settings.get("weight", 0.5)), float(settings.get("alpha", 0.1))
    mass, rule = float(settings.get("head_mass", 0.5)), str(settings.get("head_rule", "within"))
    scaled = bool(settings.get("scaled", False))
    if settings:
        whole(torch.zeros(2), torch.zeros(2))  # refuses those out of range

    def dense(policy_logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
        return whole(policy_logits, ref_logits)

    def adaptive(rows: Rows, expm1: Tensor) -> Tensor:
        return _adaptive(rows, expm1, mass, rule)

    if name == "js" and weight in (0.0, 1.0):
        if not scaled:
            return RowDivergence(_none, dense, 0.0)
        name = "rkl" if weight else "fkl"
    if name == "rkl" or (name, weight) == ("fkl_rkl", 0.0) or (name, alpha) == ("skew_rkl", 0.0):
        return RowDivergence(None, dense, 1.0)
    readers: dict[str, Callable[[Rows, bool], Tensor]] = {
        "fkl": lambda rows, d: _forward_reverse(rows, d, lambda *_: 1.0),
        "fkl_rkl": lambda rows, d: _forward_reverse(rows, d, lambda *_: weight),
        "js": lambda rows, d: _jensen_shannon(rows, d, weight, scaled),
        "skew_fkl": lambda rows, d: _skew_forward(rows, d, alpha),
        "skew_rkl": lambda rows, d: _skew_reverse(rows, d, alpha),
        "akl": lambda rows, d: _forward_reverse(rows, d, adaptive),
        "akl_r": lambda rows, d: _forward_reverse(rows, d, lambda *x: 1 - adaptive(*x)),
    }
    if name not in readers:
        known = ", ".join(readers)
        raise ValueError(f"divergence {name!r} has no fused form; these have: rkl, {known}")
    gain: float | None = None
    if name == "js":
        gain = -math.log(weight) * (1 / (1 - weight) if scaled else weight)
    elif name == "skew_fkl" and alpha > 0:
        gain = alpha - 1 - math.log(alpha)
    elif name == "skew_rkl":
        gain = 1 - alpha
    return RowDivergence(readers[name], dense, gain)


def _topk(k: int) -> RowDivergence:
    if k < 1:
        raise ValueError(f"TopK(k={k}): must be at least 1")

    def read(rows: Rows, differentiate: bool) -> Tensor:
        s = rows.t.sub_(rows.kl + rows.t_mean)
        index = rows.p.topk(min(k, rows.p.shape[1]), 1).indices
        p, u = rows.p.gather(1, index) / rows.p_sum, -s.gather(1, index)
        tail = ~(index == rows.tokens).any(1, keepdim=True)
        token_u = -s.gather(1, rows.tokens)
        value = (p * u).sum(1, keepdim=True) + tail * token_u
        if differentiate:
            slope = tail * (token_u + 1)
            rows.t.copy_((p * (u + 1)).sum(1, keepdim=True) + slope)
            rows.t.scatter_add_(1, index, -(u + 1))
            own = rows.p.gather(1, rows.tokens).clamp_(min=SMALLEST_P)
            rows.p.scatter_(1, rows.tokens, own)
            rows.t.scatter_add_(1, rows.tokens, -slope * rows.p_sum / own)
        return value

    def dense(policy_logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
        logp, logq = log_softmax_pair(policy_logits, ref_logits)
        index = logp.detach().topk(min(k, logp.shape[1]), 1).indices
        head = logp.gather(1, index)
        possible = head > -torch.inf  # 0 · log 0 = 0
        u = torch.where(possible, head - logq.gather(1, index), 0.0)
        head = (head.exp() * u).sum(1)
        own = logp.gather(1, tokens)[:, 0]
        token_u = (own - logq.gather(1, tokens)[:, 0]).detach()
        tail = ~(index == tokens).any(1)
        return head + torch.where(tail, (own - own.detach() + 1) * (token_u + 1) - 1, 0.0)

    return RowDivergence(read, dense, 0.0)


def _expm1(rows: Rows) -> tuple[Tensor, Tensor]:
    """(eˢ, expm1 s) in the first two scratch blocks, with s left in t."""
    s = rows.t.sub_(rows.kl + rows.t_mean)
    x, y = rows.scratch[:2]
    torch.exp(s, out=x)
    # expm1(s) = tanh(s/2)(eˢ + 1) keeps every digit near 0, in a quarter of expm1's time.
    torch.mul(s, 0.5, out=y).tanh_().addcmul_(y, x)
    return x, y


def _forward_reverse(
    rows: Rows, differentiate: bool, forward_weight: Callable[[Rows, Tensor], float | Tensor]
) -> Tensor:
    exp, expm1 = _expm1(rows)
    w = forward_weight(rows, expm1)
    forward = rows.mean(torch.mul(exp, rows.t, out=exp).sub_(expm1)).clamp_(min=0)
    if differentiate:
        rows.t.add_(rows.kl).mul_(1 - w).add_(expm1.mul_(w))
    return w * forward + (1 - w) * rows.kl


def _adaptive(rows: Rows, expm1: Tensor, mass: float, rule: str) -> Tensor:
    """The weight [n, 1] of forward KL: the head's share of Σ |q − p|.

    Tokens of equal probability are in any order here: q comes of p eˢ, where ties are broken by
    rounding.
    """
    gap = torch.mul(rows.p, expm1, out=rows.scratch[2]).abs_()
    total = gap.sum(1, keepdim=True)
    q = rows.scratch[0].mul_(rows.p)  # unnormalised as p is; eˢ is restored below
    vocab = q.shape[1]
    share = torch.ones_like(total)
    todo = torch.arange(len(q), device=q.device) if mass < 1 else torch.arange(0)
    for k in (min(_LIKELY, vocab), vocab):
        if not len(todo):
            break
        if k < vocab:
            likely, order = q[todo].topk(k, 1)
        else:
            likely, order = q[todo].sort(dim=1, descending=True)
        likely = likely / rows.p_sum[todo]
        cumulative = likely.cumsum(1)
        in_head = cumulative <= mass if rule == "within" else cumulative - likely < mass
        in_head[:, 0] = True
        head = torch.where(in_head, gap[todo].gather(1, order), 0.0).sum(1, keepdim=True)
        share[todo] = torch.where(total[todo] > 0, head / total[todo], 0.5)
        todo = todo[in_head[:, -1]] if k < vocab else todo[:0]
    torch.add(expm1, 1, out=rows.scratch[0])
    return torch.where(total > 0, share.clamp(max=1), 0.5)


def _none(rows: Rows, differentiate: bool) -> Tensor:
    rows.t.zero_()
    return torch.zeros_like(rows.kl)


def _jensen_shannon(rows: Rows, differentiate: bool, w: float, scaled: bool) -> Tensor:
    exp, expm1 = _expm1(rows)
    factor = 1 / (w * (1 - w)) if scaled else 1.0
    log_mixture = torch.mul(expm1, w, out=rows.scratch[2]).log1p_()
    expm1.mul_(w).add_(1).mul_(log_mixture)  # (m/p) log(m/p)
    if differentiate:
        log_mixture = log_mixture.clone()
    value = rows.mean(exp.mul_(rows.t).mul_(w).sub_(expm1)).clamp_(min=0)
    if differentiate:
        torch.sub(log_mixture, rows.mean(log_mixture), out=rows.t).mul_((1 - w) * factor)
    return value * factor


def _skew_forward(rows: Rows, differentiate: bool, alpha: float) -> Tensor:
    exp, expm1 = _expm1(rows)
    log_ratio = torch.mul(expm1, alpha, out=rows.scratch[2]).log1p_().neg_().add_(rows.t)
    value = rows.mean(exp.mul_(log_ratio).sub_(expm1, alpha=1 - alpha)).clamp_(min=0)
    if differentiate:
        mixture = torch.mul(expm1, alpha, out=exp).add_(1)
        r = expm1.mul_(1 - alpha).div_(mixture)
        torch.sub(r, rows.mean(r), out=rows.t).mul_(1 - alpha)
    return value


def _skew_reverse(rows: Rows, differentiate: bool, alpha: float) -> Tensor:
    exp, expm1 = _expm1(rows)
    expm1.mul_(1 - alpha)
    log_mixture = torch.log1p(expm1, out=exp)
    value = rows.mean(torch.sub(expm1, log_mixture, out=rows.t)).clamp_(min=0)
    if differentiate:
        mixture = torch.add(expm1, 1, out=rows.t)
        g = log_mixture.sub_(expm1.mul_(alpha).div_(mixture))
        torch.sub(g, rows.mean(g), out=rows.t)
    return value
