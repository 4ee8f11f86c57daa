"""The sweep over chunks: logits, statistics, gradient of the logits, and back."""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Self

import torch
from torch import Tensor

from rlkl.kl.divergences import log_softmax_pair
from rlkl.kl.fused.generators import RowDivergence, Rows
from rlkl.kl.fused.heads import (
    Gradients,
    ModuleHead,
    OutputHead,
    Product,
    check_head,
    inputs_of,
    product_of,
)
from rlkl.kl.fused.records import TokenLogp, TokenStats
from rlkl.kl.fused.workers import Workers

# A chunk holds about this many logits of each model (33 MB in float32), within these rows. Fewer
# rows make the products slower: each chunk reads the whole head and adds to its whole gradient.
_CHUNK_ELEMENTS = 8_200_000
_CHUNK_ROWS = (96, 512)
# Element-wise passes run on blocks of this many logits: four float32 blocks fit a 2 MB cache.
_BLOCK_ELEMENTS = 98_304
# Above this t, p may have underflowed where the reference still has mass.
_MAX_T = 60.0
# Stands for probabilities that underflow where they must carry a gradient.
_SMALLEST_P = 1e-30


def default_chunk_size(vocab: int) -> int:
    """Tokens of a chunk, for a vocabulary of this size."""
    rows = _CHUNK_ELEMENTS // vocab // 16 * 16
    return min(max(rows, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])


def _row_kernels(device: torch.device) -> ModuleType | None:
    """The passes over rows as Triton kernels: on a GPU, where Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("rlkl.kl.fused.triton_rows")


@dataclass(frozen=True)
class Problem:
    """The checked arguments of one call, and the sweep over its chunks."""

    policy: Product
    ref: Product | None
    tokens: Tensor  # [N]
    chunk_size: int
    divergence: RowDivergence

    @classmethod
    def of(
        cls,
        policy: tuple[Tensor, OutputHead | ModuleHead],
        ref: tuple[Tensor, OutputHead | ModuleHead] | None,
        tokens: Tensor,
        divergence: RowDivergence,
        *,
        temperature: float,
        vocab_size: int | None,
        chunk_size: int | None,
        gemm_dtype: torch.dtype | None,
    ) -> Self:
        """Check the arguments of a public function; every model is (hidden, head)."""
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be positive and finite")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
        if gemm_dtype not in (None, torch.bfloat16):
            raise ValueError(f"gemm_dtype={gemm_dtype}: use None or torch.bfloat16")
        models = {"policy": policy} if ref is None else {"policy": policy, "ref": ref}
        sizes = {
            name: check_head(name, head, hidden, tokens.shape[0])
            for name, (hidden, head) in models.items()
        }
        vocab = min(sizes.values()) if vocab_size is None else vocab_size
        if vocab_size is None and len(set(sizes.values())) > 1:
            raise ValueError(
                f"ref_head has {sizes['ref']} rows, policy_head {sizes['policy']}: "
                "pass vocab_size, the number of real tokens, if the rest is padding"
            )
        for name, size in sizes.items():
            if not 0 < vocab <= size:
                raise ValueError(f"vocab_size={vocab}: {name}_head has {size} rows")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
            raise ValueError(
                f"tokens lie in [{int(tokens.min())}, {int(tokens.max())}]: the vocabulary has "
                f"{vocab}; leave masked positions out"
            )
        operands = [x for model in models.values() for x in inputs_of(*model) if x is not None]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32
        if gemm_dtype is not None and (dtype == torch.float64 or tokens.device.type != "cpu"):
            raise ValueError(
                f"gemm_dtype={gemm_dtype} is for float32 and 16-bit tensors on a CPU, these are "
                f"{dtype} on {tokens.device.type}: leave it None"
            )
        products = [
            product_of(hidden, head, vocab, temperature, dtype, gemm_dtype)
            for hidden, head in models.values()
        ]
        if chunk_size is None:
            chunk_size = default_chunk_size(vocab)
        chunk_size = min(chunk_size, max(tokens.shape[0], 1))
        ref_product = products[1] if len(products) == 2 else None
        return cls(products[0], ref_product, tokens, chunk_size, divergence)

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
            chunk = Chunk(self, workers, differentiate=gradients is not None)
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

    def __init__(self, problem: Problem, workers: Workers, differentiate: bool):
        self.problem, self.workers, self.differentiate = problem, workers, differentiate
        size, vocab = problem.chunk_size, problem.policy.vocab
        dtype, device = problem.policy.dtype, problem.tokens.device

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.rows, self.tokens = slice(0, 0), problem.tokens[:0, None]
        capped = differentiate and problem.policy.cap is not None
        # One allocation: the C library then tends to keep it between calls, which saves the page
        # faults of fresh memory (up to a quarter of a small call).
        buffers = empty(1 + (problem.ref is not None) + capped, size, vocab)
        self.p, self.t = buffers[0], buffers[-1 - capped]  # t is used only beside a reference
        self.slope = buffers[-1] if capped else None
        self.peak, self.p_sum, self.a_sum = empty(3, size, 1)
        self.t_mean, self.t_max, self.t_token, self.phi_sum, self.other = empty(5, size, 1)
        block = max(1, _BLOCK_ELEMENTS // vocab) if device.type == "cpu" else size
        self.blocks = [slice(i, i + block) for i in range(0, size, block)]
        scratch = 2 if problem.divergence.read is None else 3
        self.kernels = _row_kernels(device)
        # Kernels need no scratch, but for the divergences that they do not have.
        scratch_rows = 0 if self.kernels is not None and scratch == 2 else min(block, size)
        self.scratch = empty(workers.count, scratch, scratch_rows, vocab)

    def _each_block(self, work: Callable[[slice, Tensor], None]) -> None:
        """Run `work` on every block of rows, with scratch blocks of its shape."""
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
        slope = None if self.slope is None else self.slope[:n]
        problem.policy.logits(rows, self.p[:n], slope)
        token_logit = self.p[:n].gather(1, self.tokens)
        if problem.ref is not None:
            problem.ref.logits(rows, self.t[:n])
        if self.kernels is not None:
            self._kernel_pass(self.kernels, n)
        else:
            self._each_block(self._policy_pass if problem.ref is None else self._joint_pass)
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
            kl = self._kl(slice(0, n))
            if problem.divergence.read is None:
                ref_logp = logp + self.t[:n].gather(1, self.tokens) - kl
            else:
                ref_logp = logp + self.t_token[:n] - kl
                kl = self.other[:n]
            far = ~(self.t_max[:n] < _MAX_T)[:, 0]  # also where it is NaN
            for index in far.nonzero()[:, 0].split(_CHUNK_ROWS[0]):
                kl[index], log_ratio = self._far_divergence(index)
                ref_logp[index] = logp[index] + log_ratio
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
        p, t, x, y = self.p[block], self.t[block], scratch[0], scratch[1]
        t.sub_(p)
        self._policy_pass(block, scratch)
        mean = torch.sum(torch.mul(p, t, out=x), 1, keepdim=True, out=self.t_mean[block])
        t.sub_(mean.div_(self.p_sum[block]))
        torch.amax(t, 1, keepdim=True, out=self.t_max[block])
        torch.exp(t, out=x)
        # expm1(t) = tanh(t/2)(eᵗ + 1) keeps every digit near 0, in a quarter of expm1's time.
        torch.mul(t, 0.5, out=y).tanh_().addcmul_(y, x).sub_(t)
        torch.sum(y.mul_(p), 1, keepdim=True, out=self.phi_sum[block])
        self._other_pass(block, scratch)

    def _kernel_pass(self, kernels: ModuleType, n: int) -> None:
        t = None if self.problem.ref is None else self.t[:n]
        names = ("peak", "p_sum", "a_sum", "t_mean", "t_max", "phi_sum")
        kernels.read_rows(self.p[:n], t, {name: getattr(self, name) for name in names})
        if t is not None:
            self._each_block(self._other_pass)

    def _other_pass(self, block: slice, scratch: Tensor) -> None:
        """The divergence asked for, if it is not D_KL(policy ‖ ref)."""
        if (read := self.problem.divergence.read) is None:
            return
        p, t, tokens = self.p[block], self.t[block], self.tokens[block]
        self.t_token[block] = t.gather(1, tokens)  # t itself is overwritten
        rows = Rows(p, self.p_sum[block], t, self._kl(block), tokens, tuple(scratch))
        self.other[block] = read(rows, self.differentiate)

    def _kl(self, block: slice) -> Tensor:
        """D_KL(policy ‖ ref) [n, 1] of rows that were read."""
        # φ ≥ 0: the clamp removes rounding (below 1e-13 nats), and keeps NaN.
        return (self.phi_sum[block] / self.p_sum[block]).log1p_().clamp_(min=0)

    def _far_divergence(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence, log q(y)/p(y)) of rows where p underflows, q does not, or −inf forbids.

        Their logits are multiplied anew, and the definitions of `rlkl.kl.divergences` summed.
        """
        problem, rows = self.problem, index + self.rows.start
        tokens = problem.tokens[rows, None]
        a, b = (torch.empty_like(self.p[: len(rows)]) for _ in range(2))
        assert problem.ref is not None
        problem.policy.logits(rows, a)
        problem.ref.logits(rows, b)
        logp, logq = log_softmax_pair(a, b)
        if self.differentiate:
            with torch.enable_grad():
                value = problem.divergence.dense(a.requires_grad_(), b, tokens)
                (gradient,) = torch.autograd.grad(value.sum(), a)
            # The gradient is −p ⊙ t, and must be where p underflows too.
            p = logp.exp().clamp_(min=_SMALLEST_P)
            self.p[index], self.p_sum[index], self.t[index] = p, 1.0, -gradient / p
        else:
            value = problem.divergence.dense(a, b, tokens)
        return value.detach()[:, None], (logq - logp).gather(1, tokens)

    def logit_gradient(self, stats: tuple[Tensor, ...], given: dict[str, Tensor]) -> Tensor:
        """Gradient [n, V] with respect to what the head multiplied for the chunk last read.

        g_logp onehot(y) − p ⊙ (g_kl t + g_logp + g_entropy (log p + H)), in p's buffer.
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
        scattered = None if g_logp is None else g_logp[:, None].to(p_sum.dtype)
        slope = None if self.slope is None else self.slope[:n]
        if self.kernels is not None:
            t = None if t_slope is None else self.t[:n]
            self.kernels.gradient_rows(
                self.p[:n], t, slope, self.tokens, constant, t_slope, log_slope, scattered
            )
            return self.p[:n]

        def work(block: slice, scratch: Tensor) -> None:
            p = self.p[block]
            factor = constant[block]
            if t_slope is not None:
                factor = self.t[block].mul_(t_slope[block]).add_(factor)
            if log_slope is not None:
                log_p = _log(p, out=scratch[0])
                factor = log_p.mul_(log_slope[block]).add_(factor)
            p.mul_(factor)
            if slope is not None:
                p.mul_(slope[block])

        self._each_block(work)
        if scattered is not None:
            if slope is not None:
                scattered = scattered * slope.gather(1, self.tokens)
            self.p[:n].scatter_add_(1, self.tokens, scattered)
        return self.p[:n]


def _log(p: Tensor, out: Tensor | None = None) -> Tensor:
    """Log p, finite at p = 0, so that p log p is 0 there."""
    return torch.clamp(p, min=torch.finfo(p.dtype).tiny, out=out).log_()
