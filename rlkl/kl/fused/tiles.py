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
from functools import reduce
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rlkl.kl.fused.buffers import Buffers
from rlkl.kl.fused.engine import MAX_T, sweep
from rlkl.kl.fused.precision import gemm_precision
from rlkl.kl.fused.problem import Problem
from rlkl.kl.fused.workers import Shared, Workers

# A tile has at most so many rows, and all workers' tiles about so many logits of each model (16 MB
# in float32), but none fewer than these.
_TILE_ROWS = 2048
_TILE_ELEMENTS = 4_194_304
_SMALLEST_TILE = 262_144


class Sums(NamedTuple):
    """What is known of some rows from a part of the vocabulary; [n, 1] each, in float64."""

    peak: Tensor  # max a
    p_sum: Tensor  # Σ p, p = exp(a − peak)
    a_sum: Tensor  # Σ p (a − peak)
    t_mean: Tensor  # of b − a, under p
    t_max: Tensor  # max (b − a)
    phi_sum: Tensor  # Σ p φ(b − a − t_mean)
    outside: Tensor  # log Σ eᵇ over tokens that the policy alone forbids

    def join(self, other: Self) -> Self:
        """The sums over both parts of the vocabulary."""
        peak = torch.maximum(self.peak, other.peak)
        parts = [x._at(peak) for x in (self, other)]
        p_sum = parts[0].p_sum + parts[1].p_sum
        gap = other.t_mean - self.t_mean
        # The largest p is 1, unless both parts of the vocabulary are forbidden whole.
        own, others = (x.p_sum / p_sum.clamp(min=1) for x in parts)
        shifts = -gap * others, gap * own
        return type(self)(
            peak,
            p_sum,
            parts[0].a_sum + parts[1].a_sum,
            self.t_mean - shifts[0],
            torch.maximum(self.t_max, other.t_max),
            sum(
                (
                    x.phi_sum * shift.exp() + x.p_sum * (shift.expm1() - shift)
                    for x, shift in zip(parts, shifts, strict=True)
                ),
                torch.zeros_like(peak),
            ),
            torch.logaddexp(self.outside, other.outside),
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
        and len({x.gemm_dtype for x in products}) == 1
    )


def tile_statistics(problem: Problem) -> tuple[Tensor, ...]:
    """The statistics [N] of all tokens, those of `sweep(problem)` but for rounding."""
    n, vocab = len(problem.tokens), problem.policy.vocab
    size = min(max(n, 1), _TILE_ROWS)
    out = tuple(torch.empty(n, dtype=problem.policy.dtype) for _ in problem.record._fields)
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        gemm_precision(problem.policy.gemm_dtype),
        Workers(problem.threads) as workers,
    ):
        elements = max(_TILE_ELEMENTS // workers.count, _SMALLEST_TILE)
        width = min(-(-vocab // workers.count), max(elements // size, 1))
        tiles = workers.run(lambda _: Tile(problem, size, width))
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            parts = _read(tiles, rows, range(0, vocab, width), workers)
            for target, value in zip(out, _values(parts, problem), strict=True):
                target[rows] = value[:, 0]
    # −inf and underflow: the rare rows that only whole rows can settle.
    open_rows = (~torch.stack(out).isfinite().all(0)).nonzero()[:, 0]
    if len(open_rows):
        for target, value in zip(out, sweep(_only(problem, open_rows)), strict=True):
            target[open_rows] = value
    return out


class Part(NamedTuple):
    """What a tile knows of some rows; float64."""

    sums: Sums
    token_logit: Tensor  # [n, 1]; 0 where the token is in another tile
    ref_logit: Tensor  # as well


class Tile(Buffers):
    """The logits of one worker: many tokens, few logits of each."""

    def __init__(self, problem: Problem, size: int, width: int):
        super().__init__(problem, Workers(1), size, width, differentiate=False)

    def read(self, rows: slice, columns: slice) -> Part:
        """Multiply some columns of these rows, and sum."""
        problem, tokens = self.problem, self.problem.tokens[rows, None]
        tile = self.fit(len(tokens), columns.stop - columns.start)
        problem.policy.logits(rows, tile.p, columns=columns)
        inside = ((tokens >= columns.start) & (tokens < columns.stop)).nonzero()[:, 0]
        at = inside, tokens[inside, 0] - columns.start
        token_logit, ref_logit = torch.zeros(2, len(tokens), 1, dtype=torch.float64)
        token_logit[inside, 0] = tile.p[at].double()
        if problem.ref is not None:
            problem.ref.logits(rows, tile.t, columns=columns)
            ref_logit[inside, 0] = tile.t[at].double()
        self.reduce()
        sums = Sums(*(getattr(tile, name).to(torch.float64, copy=True) for name in Sums._fields))
        return Part(sums._replace(t_max=sums.t_max + sums.t_mean), token_logit, ref_logit)


def _read(tiles: list[Tile], rows: slice, columns: range, workers: Workers) -> list[Part]:
    """What each tile of the vocabulary knows of these rows.

    In the order of the vocabulary, whoever read them: a call gives the same bits each time.
    """
    todo, found = Shared(columns), dict[int, Part]()

    def take(worker: int) -> None:
        tile = tiles[worker]
        for first in todo:
            stop = min(first + columns.step, tile.problem.policy.vocab)
            found[first] = tile.read(rows, slice(first, stop))

    workers.run(take)
    return [found[first] for first in columns]


def _values(parts: list[Part], problem: Problem) -> Iterator[Tensor]:
    """The statistics [n, 1] of some tokens; NaN where tiles cannot tell."""
    total = reduce(Sums.join, (part.sums for part in parts))
    token_logit = sum(part.token_logit for part in parts)
    log_sum = total.p_sum.log()
    logp = token_logit - total.peak - log_sum
    yield logp
    if problem.ref is not None:
        excess = total.outside - total.peak - total.t_mean
        kl = ((total.phi_sum + excess.exp()) / total.p_sum).log1p()
        far = ~(torch.maximum(total.t_max - total.t_mean, excess) < MAX_T)
        kl.masked_fill_(far, torch.nan)
        ref_logit = sum(part.ref_logit for part in parts)
        yield logp + (ref_logit - token_logit - total.t_mean) - kl
        yield kl
    yield log_sum - total.a_sum / total.p_sum


def _only(problem: Problem, index: Tensor) -> Problem:
    """The same problem for some of its tokens."""
    return replace(
        problem,
        policy=problem.policy.only(index),
        ref=None if problem.ref is None else problem.ref.only(index),
        tokens=problem.tokens[index],
        chunk_size=min(problem.chunk_size, len(index)),
    )
