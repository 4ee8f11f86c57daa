"""Statistics without gradient: tiles of the vocabulary, whose sums are joined.

A gradient needs a row of p and t whole; a statistic does not. So a tile may have many tokens and
few logits of each, which is the shape that matrix products like, in a fraction of the memory.

For one part of the vocabulary let m = max a, s = Σ e^(a − m), μ the mean of b − a under p, and
F = Σ e^(a − m) φ(b − a − μ). Two parts x, y, brought to the larger maximum, have together

    s = s_x + s_y,    μ = (s_x μ_x + s_y μ_y) / s,
    F = e^(μ_x − μ) F_x + s_x φ(μ_x − μ) + e^(μ_y − μ) F_y + s_y φ(μ_y − μ)

(expand φ(t + δ) = e^δ φ(t) + φ(δ) + (e^δ − 1) t, and Σ p t = 0 in each part). All terms of F are
≥ 0: nothing cancels, and D_KL = log(1 + F / s) keeps its digits however small it is.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rlkl.kl.fused.buffers import Buffers
from rlkl.kl.fused.engine import MAX_T, sweep
from rlkl.kl.fused.problem import Problem
from rlkl.kl.fused.workers import Workers

# A tile has at most so many rows, and about so many logits of each model (8 MB in float32).
_TILE_ROWS = 1024
_TILE_ELEMENTS = 2_097_152


class Sums(NamedTuple):
    """What is known of some rows from a part of the vocabulary; [n, 1] each, in float64."""

    peak: Tensor  # max a
    p_sum: Tensor  # Σ p, p = exp(a − peak)
    a_sum: Tensor  # Σ p (a − peak)
    t_mean: Tensor  # of b − a, under p
    t_max: Tensor  # max (b − a)
    phi_sum: Tensor  # Σ p φ(b − a − t_mean)

    def join(self, other: Self) -> Self:
        """The sums over both parts of the vocabulary."""
        peak = torch.maximum(self.peak, other.peak)
        parts = [x._at(peak) for x in (self, other)]
        p_sum = parts[0].p_sum + parts[1].p_sum
        gap = other.t_mean - self.t_mean
        shifts = -gap * (parts[1].p_sum / p_sum), gap * (parts[0].p_sum / p_sum)
        return type(self)(
            peak,
            p_sum,
            parts[0].a_sum + parts[1].a_sum,
            self.t_mean - shifts[0],
            torch.maximum(self.t_max, other.t_max),
            sum(
                (
                    x.phi_sum * shift.exp() + x.p_sum * (shift.expm1() - shift).clamp_(min=0)
                    for x, shift in zip(parts, shifts, strict=True)
                ),
                torch.zeros_like(peak),
            ),
        )

    def _at(self, peak: Tensor) -> Self:
        """The same sums with p = exp(a − peak)."""
        shift = self.peak - peak
        factor = shift.exp()
        return self._replace(
            peak=peak,
            p_sum=factor * self.p_sum,
            a_sum=factor * (self.a_sum + shift * self.p_sum),
            phi_sum=factor * self.phi_sum,
        )


def can_tile(problem: Problem) -> bool:
    """Whether `tile_statistics` has what is asked, where it is faster than `sweep`."""
    products = [x for x in (problem.policy, problem.ref) if x is not None]
    return (
        problem.tokens.device.type == "cpu"  # a GPU reduces whole rows in one kernel
        and problem.divergence.read is None
        and all(x.sliced for x in products)
    )


def tile_statistics(problem: Problem) -> tuple[Tensor, ...]:
    """The statistics [N] of all tokens, those of `sweep(problem)` but for rounding."""
    n, vocab = len(problem.tokens), problem.policy.vocab
    size = min(max(n, 1), _TILE_ROWS)
    width = min(vocab, _TILE_ELEMENTS // size)
    out = tuple(torch.empty(n, dtype=problem.policy.dtype) for _ in problem.record._fields)
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        Workers(problem.threads) as workers,
    ):
        buffers = Buffers(problem, workers, size, width, differentiate=False)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            for target, value in zip(out, _row_statistics(problem, buffers, rows), strict=True):
                target[rows] = value
    # −inf and underflow: the rare rows that only whole rows can settle.
    open_rows = (~torch.stack(out).isfinite().all(0)).nonzero()[:, 0]
    if len(open_rows):
        for target, value in zip(out, sweep(_only(problem, open_rows)), strict=True):
            target[open_rows] = value
    return out


def _row_statistics(problem: Problem, buffers: Buffers, rows: slice) -> Iterator[Tensor]:
    """The statistics [n] of some tokens; NaN where tiles cannot tell."""
    tokens, vocab = problem.tokens[rows, None], problem.policy.vocab
    width = buffers.buffers.p.shape[1]
    total: Sums | None = None
    token_logit, ref_logit = torch.empty(2, len(tokens), 1, dtype=torch.float64)
    for first in range(0, vocab, width):
        columns = slice(first, min(first + width, vocab))
        tile = buffers.fit(len(tokens), columns.stop - first)
        problem.policy.logits(rows, tile.p, columns=columns)
        inside = ((tokens >= first) & (tokens < columns.stop)).nonzero()[:, 0]
        at = inside, tokens[inside, 0] - first
        token_logit[inside, 0] = tile.p[at].double()
        if problem.ref is not None:
            problem.ref.logits(rows, tile.t, columns=columns)
            ref_logit[inside, 0] = tile.t[at].double()
        buffers.reduce()
        part = Sums(*(getattr(tile, name).to(torch.float64, copy=True) for name in Sums._fields))
        part = part._replace(t_max=part.t_max + part.t_mean)
        total = part if total is None else total.join(part)
    assert total is not None
    log_sum = total.p_sum.log()
    logp = token_logit - total.peak - log_sum
    yield logp[:, 0]
    if problem.ref is not None:
        kl = (total.phi_sum / total.p_sum).log1p()
        kl.masked_fill_(~(total.t_max - total.t_mean < MAX_T), torch.nan)
        yield (logp + (ref_logit - token_logit - total.t_mean) - kl)[:, 0]
        yield kl[:, 0]
    yield (log_sum - total.a_sum / total.p_sum)[:, 0]


def _only(problem: Problem, index: Tensor) -> Problem:
    """The same problem for some of its tokens."""
    return replace(
        problem,
        policy=problem.policy.only(index),
        ref=None if problem.ref is None else problem.ref.only(index),
        tokens=problem.tokens[index],
        chunk_size=min(problem.chunk_size, len(index)),
    )
