"""The sweep over chunks: logits, statistics, gradient of the logits, and back."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rlkl.kl.fused.records import TokenLogp, TokenStats
from rlkl.kl.fused.workers import Workers

# A chunk holds about this many logits of each model (26 MB in float32), within these rows.
_CHUNK_ELEMENTS = 6_500_000
_CHUNK_ROWS = (64, 512)
# Element-wise passes run on blocks of this many logits: four float32 blocks fit a 2 MB cache.
_BLOCK_ELEMENTS = 98_304
# Heads are read in slices of this many rows: faster for BLAS, and no 16-bit head is widened whole.
_VOCAB_SLICE = 8192
# Above this t, p may have underflowed where the reference still has mass.
_MAX_T = 60.0


@dataclass(frozen=True)
class Head:
    """One model's logits, scale · (hidden weightᵀ + bias), multiplied chunk by chunk in `dtype`."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    dtype: torch.dtype
    gemm_dtype: torch.dtype | None

    def scaled_hidden(self, rows: slice | Tensor) -> Tensor:
        """Scaled hidden states of some tokens, [n, H]."""
        hidden = self.hidden[rows].to(self.dtype)
        return hidden if self.scale == 1.0 else hidden * self.scale

    def weight_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary with their rows of the weight."""
        for start in range(0, self.weight.shape[0], _VOCAB_SLICE):
            columns = slice(start, start + _VOCAB_SLICE)
            yield columns, self.weight[columns].to(self.dtype)

    def logits(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        """Fill `out` [n, V] with the scaled logits of some tokens."""
        hidden = self.scaled_hidden(rows)
        # Factors that are bfloat16 already lose nothing in a bfloat16 product with a float32 sum.
        lossless = self.hidden.dtype == self.weight.dtype == torch.bfloat16 and self.scale == 1.0
        with _gemm_precision(torch.bfloat16 if lossless else self.gemm_dtype):
            for columns, weight in self.weight_slices():
                torch.mm(hidden, weight.t(), out=out[:, columns])
        if self.bias is not None:
            out.add_(self.bias.to(self.dtype) * self.scale)
        return out


class Gradients:
    """Sums of the gradients of hidden, weight and bias, for those that need one."""

    def __init__(self, head: Head, inputs: Sequence[Tensor | None], needed: Sequence[bool]):
        self.head = head
        sums = [
            torch.zeros_like(x, dtype=head.dtype) if need and x is not None else None
            for x, need in zip(inputs, needed, strict=True)
        ]
        self.hidden, self.weight, self.bias = sums

    def add(self, rows: slice, logits: Tensor) -> None:
        """Add a chunk, given the gradient [n, V] of its scaled logits."""
        head = self.head
        with _gemm_precision(head.gemm_dtype):
            if self.hidden is not None:
                for columns, weight in head.weight_slices():
                    self.hidden[rows].addmm_(logits[:, columns], weight, alpha=head.scale)
            if self.weight is not None:
                vocab = logits.shape[1]  # rows beyond it are padding: their gradient stays 0
                self.weight[:vocab].addmm_(logits.t(), head.scaled_hidden(rows))
        if self.bias is not None:
            self.bias[: logits.shape[1]].add_(logits.sum(0), alpha=head.scale)

    def in_dtype_of(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The three sums, each in its input's dtype."""
        return tuple(
            None if total is None or x is None else total.to(x.dtype)
            for total, x in zip((self.hidden, self.weight, self.bias), inputs, strict=True)
        )


@contextmanager
def _gemm_precision(dtype: torch.dtype | None) -> Iterator[None]:
    """Float32 products whose factors oneDNN rounds to bfloat16 (CPU); sums and output stay float32.

    torch.mm of bfloat16 tensors would round its output as well, which drowns a small KL. CPUs
    without bfloat16 arithmetic ignore the setting. It is the process's, hence set only meanwhile.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] (dynamic)
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class Problem:
    """The checked arguments of one call, and the sweep over its chunks."""

    policy: Head
    ref: Head | None
    tokens: Tensor  # [N]
    chunk_size: int

    @classmethod
    def of(
        cls,
        policy: tuple[Tensor, Tensor, Tensor | None],
        ref: tuple[Tensor, Tensor, Tensor | None] | None,
        tokens: Tensor,
        *,
        temperature: float,
        vocab_size: int | None,
        chunk_size: int | None,
        gemm_dtype: torch.dtype | None,
    ) -> Self:
        """Check the arguments of a public function; every model is (hidden, head, bias)."""
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be positive and finite")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
        models = {"policy": policy} if ref is None else {"policy": policy, "ref": ref}
        sizes = {name: head.shape[0] for name, (_, head, _) in models.items()}
        vocab = min(sizes.values()) if vocab_size is None else vocab_size
        if vocab_size is None and len(set(sizes.values())) > 1:
            raise ValueError(
                f"ref_head has {sizes['ref']} rows, policy_head {sizes['policy']}: "
                "pass vocab_size, the number of real tokens, if the rest is padding"
            )
        operands = [x for model in models.values() for x in model if x is not None]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32
        if gemm_dtype not in (None, torch.bfloat16):
            raise ValueError(f"gemm_dtype={gemm_dtype}: use None or torch.bfloat16")
        if gemm_dtype is not None and (dtype == torch.float64 or tokens.device.type != "cpu"):
            raise ValueError(
                f"gemm_dtype={gemm_dtype} is for float32 and 16-bit tensors on a CPU, these are "
                f"{dtype} on {tokens.device.type}: leave it None"
            )
        heads = []
        for name, (hidden, head, bias) in models.items():
            if hidden.shape != (tokens.shape[0], head.shape[1]):
                raise ValueError(
                    f"{name}_hidden has shape {tuple(hidden.shape)}: expected [N, H] = "
                    f"{(tokens.shape[0], head.shape[1])} from tokens and {name}_head"
                )
            if not 0 < vocab <= head.shape[0]:
                raise ValueError(f"vocab_size={vocab}: {name}_head has {head.shape[0]} rows")
            if bias is not None and bias.shape != head.shape[:1]:
                raise ValueError(
                    f"{name}_bias has shape {tuple(bias.shape)}: expected {tuple(head.shape[:1])}"
                )
            bias = None if bias is None else bias.detach()[:vocab]
            weight = head.detach()[:vocab]
            heads.append(Head(hidden.detach(), weight, bias, 1 / temperature, dtype, gemm_dtype))
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
            raise ValueError(
                f"tokens lie in [{int(tokens.min())}, {int(tokens.max())}]: the vocabulary has "
                f"{vocab}; leave masked positions out"
            )
        if chunk_size is None:
            chunk_size = min(max(_CHUNK_ELEMENTS // vocab, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])
        chunk_size = min(chunk_size, max(tokens.shape[0], 1))
        return cls(heads[0], heads[1] if len(heads) == 2 else None, tokens, chunk_size)

    @property
    def record(self) -> type[TokenStats] | type[TokenLogp]:
        """What the statistics of this problem are called, in their order."""
        return TokenLogp if self.ref is None else TokenStats

    def sweep(
        self,
        upstream: Callable[[slice, tuple[Tensor, ...]], dict[str, Tensor]] | None = None,
        gradients: Gradients | None = None,
    ) -> tuple[Tensor, ...]:
        """The statistics [N] of all tokens, chunk by chunk.

        `upstream(rows, statistics)` is called on each chunk and returns the gradient of some loss
        per statistic; `gradients` adds up what follows from it.
        """
        n, dtype, device = len(self.tokens), self.policy.dtype, self.tokens.device
        stats = tuple(torch.empty(n, dtype=dtype, device=device) for _ in self.record._fields)
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            Workers(device) as workers,
        ):
            chunk = Chunk(self, workers)
            for start in range(0, n, self.chunk_size):
                rows = slice(start, min(start + self.chunk_size, n))
                part = tuple(out[rows] for out in stats)
                chunk.read(rows, part)
                given = {} if upstream is None else upstream(rows, part)
                if gradients is not None and given:
                    gradients.add(rows, chunk.logit_gradient(part, given))
        return stats


class Chunk:
    """The buffers of one chunk: first logits, then p and t (see the package), then the gradient.

    p is kept as exp(a − max) beside its row sum: that saves the pass that would divide it. Passes
    over logits run on blocks of a few rows; what is per token is done once for the whole chunk.
    """

    def __init__(self, problem: Problem, workers: Workers):
        self.problem, self.workers = problem, workers
        size, vocab = problem.chunk_size, len(problem.policy.weight)
        dtype, device = problem.policy.dtype, problem.tokens.device

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.rows, self.tokens = slice(0, 0), problem.tokens[:0, None]
        # One allocation: the C library then tends to keep it between calls, which saves the page
        # faults of fresh memory (up to a quarter of a small call).
        buffers = empty(1 if problem.ref is None else 2, size, vocab)
        self.p, self.t = buffers[0], buffers[-1]  # t is used only beside a reference
        self.peak, self.p_sum, self.a_sum = empty(3, size, 1)
        self.t_mean, self.t_max, self.phi_sum = empty(3, size, 1)
        block = max(1, _BLOCK_ELEMENTS // vocab) if device.type == "cpu" else size
        self.blocks = [slice(i, i + block) for i in range(0, size, block)]
        self.scratch = empty(workers.count, 2, min(block, size), vocab)

    def _each_block(self, work: Callable[[slice, Tensor], None]) -> None:
        """Run `work` on every block of rows, with two scratch blocks of its shape."""
        n = self.rows.stop - self.rows.start
        blocks = [slice(b.start, min(b.stop, n)) for b in self.blocks if b.start < n]

        def strip(worker: int) -> None:
            for block in blocks[worker :: self.workers.count]:
                work(block, self.scratch[worker, :, : block.stop - block.start])

        self.workers.run(strip)

    def read(self, rows: slice, out: tuple[Tensor, ...]) -> None:
        """Multiply the logits of these tokens, reduce them to statistics, leave p and t."""
        problem, n = self.problem, rows.stop - rows.start
        self.rows, self.tokens = rows, problem.tokens[rows, None]
        problem.policy.logits(rows, self.p[:n])
        token_logit = self.p[:n].gather(1, self.tokens)
        if problem.ref is None:
            self._each_block(self._policy_pass)
        else:
            problem.ref.logits(rows, self.t[:n])
            self._each_block(self._joint_pass)
        forbidding = self.a_sum[:n, 0].isnan().nonzero()[:, 0]  # −inf logits: 0 · log 0 = 0
        for index in forbidding.split(_CHUNK_ROWS[0]):
            p = self.p[index]
            self.a_sum[index] = _log(p).mul_(p).sum(1, keepdim=True)
        log_sum = self.p_sum[:n].log()
        logp = token_logit - self.peak[:n] - log_sum
        entropy = log_sum - self.a_sum[:n] / self.p_sum[:n]
        if problem.ref is None:
            values = logp, entropy
        else:
            # φ ≥ 0: the clamp removes rounding (below 1e-13 nats), and keeps NaN.
            kl = (self.phi_sum[:n] / self.p_sum[:n]).log1p_().clamp_(min=0)
            ref_logp = logp + self.t[:n].gather(1, self.tokens) - kl
            far = ~(self.t_max[:n] < _MAX_T)[:, 0]  # also where it is NaN
            for index in far.nonzero()[:, 0].split(_CHUNK_ROWS[0]):
                kl[index], ref_logp[index] = self._far_divergence(index)
            values = logp, ref_logp, kl, entropy
        for target, value in zip(out, values, strict=True):
            target.copy_(value[:, 0])

    def _policy_pass(self, block: slice, scratch: Tensor) -> None:
        p, p_sum, x = self.p[block], self.p_sum[block], scratch[0]
        peak = torch.amax(p, 1, keepdim=True, out=self.peak[block])
        torch.exp(torch.sub(p, peak, out=x), out=p)
        torch.sum(p, 1, keepdim=True, out=p_sum)
        torch.sum(x.mul_(p), 1, keepdim=True, out=self.a_sum[block])

    def _joint_pass(self, block: slice, scratch: Tensor) -> None:
        p, t, (x, y) = self.p[block], self.t[block], scratch
        t.sub_(p)
        self._policy_pass(block, scratch)
        mean = torch.sum(torch.mul(p, t, out=x), 1, keepdim=True, out=self.t_mean[block])
        t.sub_(mean.div_(self.p_sum[block]))
        torch.amax(t, 1, keepdim=True, out=self.t_max[block])
        torch.exp(t, out=x)
        # expm1(t) = tanh(t/2)(eᵗ + 1) keeps every digit near 0, in a quarter of expm1's time.
        torch.mul(t, 0.5, out=y).tanh_().addcmul_(y, x).sub_(t)
        torch.sum(y.mul_(p), 1, keepdim=True, out=self.phi_sum[block])

    def _far_divergence(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(D_KL, log q(y)) of rows where p underflows and q does not, or tokens are forbidden.

        There Σ p·d + Σ p·expm1(−d) is summed as written, from logits multiplied anew.
        """
        problem, rows = self.problem, index + self.rows.start
        a, b = (
            head.logits(rows, self.p.new_empty(len(rows), self.p.shape[1]))
            for head in (problem.policy, problem.ref)
            if head is not None
        )
        a.sub_(a.amax(1, keepdim=True))
        b.sub_(b.amax(1, keepdim=True))
        p, q = a.exp(), b.exp()
        p_sum, q_sum = p.sum(1, keepdim=True), q.sum(1, keepdim=True)
        p.div_(p_sum)
        q.div_(q_sum)
        d = torch.where(p > 0, (a - b) - (p_sum / q_sum).log(), 0.0)
        # Where d < −1 nothing cancels in q − p, and expm1(−d) could overflow.
        rest = torch.where((p > 0) & (d > -1), p * torch.expm1(-d), q - p)
        kl = (p * d + rest).sum(1, keepdim=True).clamp_(min=0)
        self.p[index], self.p_sum[index] = p, 1.0
        self.t[index] = kl - d
        return kl, b.gather(1, problem.tokens[rows, None]) - q_sum.log()

    def logit_gradient(self, stats: tuple[Tensor, ...], given: dict[str, Tensor]) -> Tensor:
        """Gradient [n, V] of the chunk last read with respect to its logits, in p's buffer.

        g_logp onehot(y) − p ⊙ (g_kl t + g_logp + g_entropy (log p + H)).
        """
        n = self.rows.stop - self.rows.start
        p_sum = self.p_sum[:n]
        # The factor of p is a row constant, plus row slopes times t and log(p · p_sum).
        constant = torch.zeros_like(p_sum)
        t_slope = log_slope = None
        if (g_logp := given.get("policy_logp")) is not None:
            constant -= g_logp[:, None]
        if (g_kl := given.get("kl")) is not None:
            t_slope = g_kl[:, None] / -p_sum
        if (g_entropy := given.get("entropy")) is not None:
            log_slope = g_entropy[:, None] / -p_sum
            constant -= g_entropy[:, None] * (stats[-1][:, None] - p_sum.log())
        constant /= p_sum

        def work(block: slice, scratch: Tensor) -> None:
            p = self.p[block]
            factor = constant[block]
            if t_slope is not None:
                factor = self.t[block].mul_(t_slope[block]).add_(factor)
            if log_slope is not None:
                log_p = _log(p, out=scratch[0])
                factor = log_p.mul_(log_slope[block]).add_(factor)
            p.mul_(factor)

        self._each_block(work)
        gradient = self.p[:n]
        if g_logp is not None:
            gradient.scatter_add_(1, self.tokens, g_logp[:, None].to(gradient.dtype))
        return gradient


def _log(p: Tensor, out: Tensor | None = None) -> Tensor:
    """Log p, finite at p = 0, so that p log p is 0 there."""
    return torch.clamp(p, min=torch.finfo(p.dtype).tiny, out=out).log_()
