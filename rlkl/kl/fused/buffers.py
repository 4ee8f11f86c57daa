"""The logits of a chunk or a tile in memory, and the passes over them by every thread."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rlkl.kl.fused import torch_rows
from rlkl.kl.fused.generators import Rows
from rlkl.kl.fused.problem import Problem
from rlkl.kl.fused.workers import Workers

# Passes of several operations run on blocks of this many logits a thread: p, t and scratch fit a
# 2 MB cache.
_BLOCK_ELEMENTS = 131_072

Scratch = tuple[Tensor, ...]


class Block(NamedTuple):
    """Some rows of a chunk: logits, then p and t (see the package); what is known of each row."""

    p: Tensor  # [n, V]; exp(a − max): not divided by its sum, which saves a pass
    t: Tensor  # [n, V]
    slope: Tensor  # [n, V] of the soft-cap, or empty
    tokens: Tensor  # [n, 1], as all that follow
    peak: Tensor  # max a
    outside: Tensor  # log Σ eᵇ over tokens that the policy alone forbids; −∞ without any
    p_sum: Tensor
    a_sum: Tensor  # Σ p (a − max)
    t_mean: Tensor
    t_max: Tensor
    t_token: Tensor
    t_sum: Tensor  # Σ p t: what the rounding of the mean left
    phi_sum: Tensor  # Σ p φ(t)
    other: Tensor  # the divergence asked for, if it is not D_KL(policy ‖ ref)
    constant: Tensor  # the gradient's factors of p: this
    t_factor: Tensor  # + this · t
    log_factor: Tensor  # + this · log p
    token_gradient: Tensor  # and what is added at the token

    def first(self, n: int, width: int) -> Self:
        """The first n rows and as many columns."""
        return self._make(x[:n, :width] for x in self)

    def split(self, n: int) -> list[Self]:
        """Blocks of n rows each."""
        return [self._make(parts) for parts in zip(*(x.split(n) for x in self), strict=True)]

    @property
    def sums(self) -> dict[str, Tensor]:
        """What `read_rows` fills."""
        names = ("peak", "p_sum", "a_sum", "t_mean", "t_max", "t_sum", "phi_sum")
        return {name: getattr(self, name) for name in names}

    @property
    def excess(self) -> Tensor:
        """Log of what tokens that the policy alone forbids add to Σ p φ(t): p eᵗ as p goes to 0."""
        return self.outside - self.peak - self.t_mean

    @property
    def kl(self) -> Tensor:
        """D_KL(policy ‖ ref) [n, 1] of rows that were read."""
        return ((self.phi_sum + self.excess.exp()) / self.p_sum).log1p_()


class Buffers:
    """Two matrices of logits, which passes over their rows turn into p and t."""

    def __init__(
        self, problem: Problem, workers: Workers, size: int, width: int, *, differentiate: bool
    ):
        self.problem, self.workers, self.differentiate = problem, workers, differentiate
        self.passes = problem.passes
        dtype, device = problem.policy.dtype, problem.tokens.device

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        capped = differentiate and problem.policy.cap is not None
        # One allocation: the C library then tends to keep it between calls, which saves the page
        # faults of fresh memory (up to a quarter of a small call).
        buffers = empty(1 + (problem.ref is not None) + capped, size, width)
        t = buffers[1] if problem.ref is not None else empty(size, 0)
        slope = buffers[-1] if capped else empty(size, 0)
        tokens = torch.empty_like(problem.tokens[:size, None])
        self.buffers = self.rows = Block(buffers[0], t, slope, tokens, *empty(14, size, 1))
        other = problem.divergence.read is not None
        self.block_rows: int | None = None  # a worker's rows all at once
        if device.type == "cpu" and (other or self.passes is torch_rows):
            shared_by = torch.get_num_threads() if workers.count == 1 else 1
            self.block_rows = max(1, shared_by * _BLOCK_ELEMENTS // width)
        scratch_rows = min(self.block_rows or size, size)
        self.scratch = empty(workers.count, 3 * other, scratch_rows, width)
        self.strips = self._strips()

    def fit(self, n: int, width: int) -> Block:
        """The part of the buffers that holds n rows of so many logits, from now on."""
        if self.rows.p.shape != (n, width):
            self.rows = self.buffers.first(n, width)
            self.strips = self._strips()
        return self.rows

    def _strips(self) -> list[list[tuple[Block, Scratch]]]:
        """Each worker's blocks of the rows at hand, with scratch blocks [n, V] of their shape."""
        count = self.workers.count
        blocks = self.rows.split(self.block_rows or -(-len(self.rows.p) // count))
        return [
            [
                (block, tuple(scratch[:, : len(block.p), : block.p.shape[1]]))
                for block in blocks[worker::count]
            ]
            for worker, scratch in enumerate(self.scratch)
        ]

    def _each_block(self, work: Callable[[Block, Scratch], None]) -> None:
        """Run `work` on every block."""

        def strip(worker: int) -> None:
            for block, scratch in self.strips[worker]:
                work(block, scratch)

        self.workers.run(strip)

    def reduce(self) -> None:
        """Logits to p and t, and the sums of each row."""
        if self.problem.ref is not None:
            self.rows.outside.fill_(-torch.inf)
            forbidden = (self.rows.p[0] == -torch.inf).nonzero()[:, 0]
            if len(forbidden):
                self._each_block(lambda block, _: _set_apart(block, forbidden))
        self._each_block(self._read)

    def _read(self, block: Block, scratch: Scratch) -> None:
        t = None if self.problem.ref is None else block.t
        self.passes.read_rows(block.p, t, block.sums, with_phi=self.problem.ref_logp is None)
        if (read := self.problem.divergence.read) is not None and t is not None:
            block.t_token.copy_(t.gather(1, block.tokens))  # t itself is overwritten
            t_mean = block.t_sum / block.p_sum
            rows = Rows(block.p, block.p_sum, t, t_mean, block.kl, block.tokens, scratch)
            block.other.copy_(read(rows, self.differentiate))
            block.t_sum.zero_()  # X needs no more of it

    def differentiate_logits(self, *, logp: bool, kl: bool, entropy: bool) -> None:
        """The gradient of what the head multiplied in p's place, by each row's factors."""

        def work(block: Block, _: Scratch) -> None:
            self.passes.gradient_rows(
                block.p,
                block.t if kl else None,
                block.slope if block.slope.numel() else None,
                block.tokens,
                block.constant,
                block.t_factor if kl else None,
                block.log_factor if entropy else None,
                block.token_gradient if logp else None,
            )

        self._each_block(work)


def _set_apart(block: Block, tokens: Tensor) -> None:
    """Let the reference forbid too what the policy forbids; what it gave is left in `outside`.

    The tokens are those of one row: a bias forbids the same in all. A row where the policy allows
    one of them looks as if the reference alone forbade it, and is read anew as those are.
    """
    rows = max(1, _BLOCK_ELEMENTS // len(tokens))
    for t, outside in zip(block.t.split(rows), block.outside.split(rows), strict=True):
        torch.logsumexp(t[:, tokens], 1, keepdim=True, out=outside)
    block.t.index_fill_(1, tokens, -torch.inf)
