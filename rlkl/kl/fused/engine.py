"""The sweep over chunks: logits, statistics, gradient of the logits, and back."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Self

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

# A chunk holds about this many logits of each model (42 MB in float32), within these rows. Fewer
# rows make the products slower: each chunk reads the whole head and adds to its whole gradient.
_CHUNK_ELEMENTS = 10_500_000
_CHUNK_ROWS = (208, 512)
# Element-wise passes run on blocks of this many logits a thread: p, t and scratch fit a 2 MB cache.
_BLOCK_ELEMENTS = 131_072
# Below this many nats, eᵗ − t − 1 by subtraction has lost the digits that count.
_NEAR = 5e-4
# Above this t, p may have underflowed where the reference still has mass.
MAX_T = 60.0
# Stands for probabilities that underflow where they must carry a gradient.
_SMALLEST_P = 1e-30


def default_chunk_size(vocab: int) -> int:
    """Tokens of a chunk, for a vocabulary of this size."""
    rows = _CHUNK_ELEMENTS // vocab // 16 * 16
    return min(max(rows, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])


def _row_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The passes over rows as compiled loops: Triton's on a GPU, Numba's on a CPU, or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("rlkl.kl.fused.triton_rows")
    numba = device.type == "cpu" and dtype == torch.float32 and importlib.util.find_spec("numba")
    return importlib.import_module("rlkl.kl.fused.numba_rows") if numba else None


@dataclass(frozen=True)
class Problem:
    """The checked arguments of one call, and the sweep over its chunks."""

    policy: Product
    ref: Product | None
    tokens: Tensor  # [N]
    chunk_size: int
    divergence: RowDivergence
    ref_logp: Tensor | None  # [N], where the caller knows it

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
        ref_logp: Tensor | None = None,
    ) -> Self:
        """Check the arguments of a public function; every model is (hidden, head)."""
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be positive and finite")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
        if gemm_dtype not in (None, torch.bfloat16):
            raise ValueError(f"gemm_dtype={gemm_dtype}: use None or torch.bfloat16")
        if ref_logp is not None and divergence.read is not None:
            raise ValueError("ref_logp serves D_KL(policy ‖ ref) only: leave it None")
        if ref_logp is not None and ref_logp.shape != tokens.shape:
            raise ValueError(
                f"ref_logp has shape {tuple(ref_logp.shape)}: expected that of tokens, "
                f"{tuple(tokens.shape)}"
            )
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
        if ref_logp is not None:
            ref_logp = ref_logp.detach().to(dtype)
        return cls(products[0], ref_product, tokens, chunk_size, divergence, ref_logp)

    @property
    def kernels(self) -> ModuleType | None:
        """The compiled passes for these logits, if there are any."""
        return _row_kernels(self.tokens.device, self.policy.dtype)

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
            Workers(device, self.policy.vocab, self.kernels is not None) as workers,
        ):
            chunk = Chunk(self, workers, differentiate=gradients is not None)
            for start in range(0, n, self.chunk_size):
                rows = slice(start, min(start + self.chunk_size, n))
                part = tuple(out[rows] for out in stats)
                chunk.read(start, part)
                given = {} if upstream is None else upstream(rows, part)
                if gradients is not None and given:
                    gradients.add(rows, chunk.logit_gradient(part, given))
        return stats


Scratch = tuple[Tensor, ...]


class Block(NamedTuple):
    """Some rows of a chunk: logits, then p and t (see the package); what is known of each row."""

    p: Tensor  # [n, V]; exp(a − max): not divided by its sum, which saves a pass
    t: Tensor  # [n, V]
    slope: Tensor  # [n, V] of the soft-cap, or empty
    tokens: Tensor  # [n, 1], as all that follow
    peak: Tensor  # max a
    p_sum: Tensor
    a_sum: Tensor  # Σ p (a − max)
    t_mean: Tensor
    t_max: Tensor
    t_token: Tensor
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
    def kl(self) -> Tensor:
        """D_KL(policy ‖ ref) [n, 1] of rows that were read."""
        # φ ≥ 0: the clamp removes rounding (below 1e-13 nats), and keeps NaN.
        return (self.phi_sum / self.p_sum).log1p_().clamp_(min=0)


class Buffers:
    """Two matrices of logits, which passes over blocks of a few rows turn into p and t."""

    def __init__(
        self, problem: Problem, workers: Workers, size: int, width: int, *, differentiate: bool
    ):
        self.problem, self.workers, self.differentiate = problem, workers, differentiate
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
        self.buffers = self.rows = Block(buffers[0], t, slope, tokens, *empty(12, size, 1))
        shared_by = torch.get_num_threads() if workers.count == 1 else 1
        block_rows = max(1, shared_by * _BLOCK_ELEMENTS // width)
        self.block_rows = block_rows if device.type == "cpu" else size
        scratch = 1 if problem.divergence.read is None else 3
        self.kernels = problem.kernels
        # Kernels need no scratch, but for the divergences that they do not have.
        scratch_rows = 0 if self.kernels is not None and scratch == 1 else self.block_rows
        self.scratch = empty(workers.count, scratch, min(scratch_rows, size), width)
        self.strips, self.shares = self._strips(), self._shares()

    def fit(self, n: int, width: int) -> Block:
        """The part of the buffers that holds n rows of so many logits, from now on."""
        if self.rows.p.shape != (n, width):
            self.rows = self.buffers.first(n, width)
            self.strips, self.shares = self._strips(), self._shares()
        return self.rows

    def _shares(self) -> list[Block]:
        """Each worker's rows, for kernels that need no blocks; fewer than workers if rows are."""
        return self.rows.split(-(-len(self.rows.p) // self.workers.count))

    def _strips(self) -> list[list[tuple[Block, Scratch]]]:
        """Each worker's blocks of the rows at hand, with scratch blocks [n, V] of their shape."""
        blocks, count = self.rows.split(self.block_rows), self.workers.count
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
        if self.kernels is not None:
            self._kernel_pass(self.kernels)
        else:
            self._each_block(self._policy_pass if self.problem.ref is None else self._joint_pass)

    def _policy_pass(self, block: Block, scratch: Scratch) -> None:
        p, x = block.p, scratch[0]
        torch.amax(p, 1, keepdim=True, out=block.peak)
        torch.exp(torch.sub(p, block.peak, out=x), out=p)
        torch.sum(p, 1, keepdim=True, out=block.p_sum)
        torch.sum(x.mul_(p), 1, keepdim=True, out=block.a_sum)

    def _joint_pass(self, block: Block, scratch: Scratch) -> None:
        p, t, x = block.p, block.t, scratch[0]
        t.sub_(p)
        self._policy_pass(block, scratch)
        torch.sum(torch.mul(p, t, out=x), 1, keepdim=True, out=block.t_mean)
        t.sub_(block.t_mean.div_(block.p_sum))
        if self.problem.ref_logp is not None:
            # The KL follows from log q(y), also where p underflows; NaN marks rows with −inf.
            torch.sub(block.t_mean, block.t_mean, out=block.t_max)
            return
        torch.amax(t, 1, keepdim=True, out=block.t_max)
        torch.exp(t, out=x).sub_(t).sub_(1).mul_(p)
        torch.sum(x, 1, keepdim=True, out=block.phi_sum)
        for index in _where(block.phi_sum < _NEAR * block.p_sum):
            block.phi_sum[index] = _small_phi_sum(p[index], t[index])
        self._other_pass(block, scratch)

    def _kernel_pass(self, kernels: ModuleType) -> None:
        joint, with_phi = self.problem.ref is not None, self.problem.ref_logp is None
        names = ("peak", "p_sum", "a_sum", "t_mean", "t_max", "phi_sum")

        def read(share: Block) -> None:
            sums = {name: getattr(share, name) for name in names}
            kernels.read_rows(share.p, share.t if joint else None, sums, with_phi=with_phi)

        self._each_share(read)
        if joint:
            self._each_block(self._other_pass)

    def _each_share(self, work: Callable[[Block], None]) -> None:
        """Run `work` on every worker's rows."""
        self.workers.run(
            lambda worker: work(self.shares[worker]) if worker < len(self.shares) else None
        )

    def _other_pass(self, block: Block, scratch: Scratch) -> None:
        """The divergence asked for, if it is not D_KL(policy ‖ ref)."""
        if (read := self.problem.divergence.read) is None:
            return
        block.t_token.copy_(block.t.gather(1, block.tokens))  # t itself is overwritten
        rows = Rows(block.p, block.p_sum, block.t, block.kl, block.tokens, scratch)
        block.other.copy_(read(rows, self.differentiate))


class Chunk(Buffers):
    """Some tokens with their whole rows: first logits, then p and t, then the gradient.

    What is per token is done once for the chunk.
    """

    def __init__(self, problem: Problem, workers: Workers, *, differentiate: bool):
        size, vocab = problem.chunk_size, problem.policy.vocab
        super().__init__(problem, workers, size, vocab, differentiate=differentiate)
        self.start = 0

    def read(self, start: int, out: tuple[Tensor, ...]) -> None:
        """Multiply the logits of these tokens, reduce them to statistics, leave p and t."""
        problem, n = self.problem, len(out[0])
        rows, self.start = slice(start, start + n), start
        here = self.fit(n, problem.policy.vocab)
        here.tokens.copy_(problem.tokens[rows, None])
        problem.policy.logits(rows, here.p, here.slope if here.slope.numel() else None)
        token_logit = here.p.gather(1, here.tokens)
        if problem.ref is not None:
            problem.ref.logits(rows, here.t)
        self.reduce()
        for index in _where(here.a_sum.isnan()):  # −inf logits: 0 · log 0 = 0
            p = here.p[index]
            here.a_sum[index] = _log(p).mul_(p).sum(1, keepdim=True)
        log_sum = here.p_sum.log()
        logp = token_logit - here.peak - log_sum
        entropy = log_sum - here.a_sum / here.p_sum
        if problem.ref is None:
            values = logp, entropy
        else:
            values = logp, *self._joint_values(logp), entropy
        for target, value in zip(out, values, strict=True):
            target.copy_(value[:, 0])

    def _joint_values(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """(log q(y), divergence), [n, 1] each."""
        problem, here = self.problem, self.rows
        if problem.divergence.read is not None:
            ref_logp, value = logp + here.t_token - here.kl, here.other
        elif problem.ref_logp is not None:
            ref_logp = problem.ref_logp[self.start : self.start + len(logp), None]
            value = (logp - ref_logp).add_(here.t.gather(1, here.tokens)).clamp_(min=0)
        else:
            value = here.kl
            ref_logp = logp + here.t.gather(1, here.tokens) - value
        for index in _where(~(here.t_max < MAX_T)):  # also where it is NaN
            value[index], log_ratio = self._far_divergence(index)
            if problem.ref_logp is None:
                ref_logp[index] = logp[index] + log_ratio
        return ref_logp, value

    def _far_divergence(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(divergence, log q(y)/p(y)) of rows where p underflows, q does not, or −inf forbids.

        Their logits are multiplied anew, and the definitions of `rlkl.kl.divergences` summed.
        """
        problem, here, tokens = self.problem, self.rows, self.rows.tokens[index]
        rows = index + self.start
        a, b = (torch.empty_like(here.p[: len(rows)]) for _ in range(2))
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
            here.p[index], here.p_sum[index], here.t[index] = p, 1.0, -gradient / p
        else:
            value = problem.divergence.dense(a, b, tokens)
        return value.detach()[:, None], (logq - logp).gather(1, tokens)

    def logit_gradient(self, stats: tuple[Tensor, ...], given: dict[str, Tensor]) -> Tensor:
        """Gradient [n, V] with respect to what the head multiplied for the chunk last read.

        g_logp onehot(y) − p ⊙ (g_kl t + g_logp + g_entropy (log p + H)), in p's buffer.
        """
        here, p_sum = self.rows, self.rows.p_sum
        g_logp, g_kl, g_entropy = map(given.get, ("policy_logp", "kl", "entropy"))
        here.constant.zero_()
        if g_logp is not None:
            here.constant.sub_(g_logp[:, None])
        if g_kl is not None:
            torch.div(g_kl[:, None], -p_sum, out=here.t_factor)
        if g_entropy is not None:  # log p = log(p · p_sum) − log p_sum
            torch.div(g_entropy[:, None], -p_sum, out=here.log_factor)
            here.constant.sub_(g_entropy[:, None] * (stats[-1][:, None] - p_sum.log()))
        here.constant.div_(p_sum)
        if g_logp is not None:
            here.token_gradient.copy_(g_logp[:, None])
        given_columns = g_logp is not None, g_kl is not None, g_entropy is not None
        if self.kernels is not None:
            self._kernel_gradient(self.kernels, *given_columns)
        else:
            self._torch_gradient(*given_columns)
        return here.p

    def _kernel_gradient(self, kernels: ModuleType, logp: bool, kl: bool, entropy: bool) -> None:
        def work(share: Block) -> None:
            kernels.gradient_rows(
                share.p,
                share.t if kl else None,
                share.slope if share.slope.numel() else None,
                share.tokens,
                share.constant,
                share.t_factor if kl else None,
                share.log_factor if entropy else None,
                share.token_gradient if logp else None,
            )

        self._each_share(work)

    def _torch_gradient(self, logp: bool, kl: bool, entropy: bool) -> None:
        def work(block: Block, scratch: Scratch) -> None:
            factor = block.constant
            if kl:
                factor = block.t.mul_(block.t_factor).add_(factor)
            if entropy:
                factor = _log(block.p, out=scratch[0]).mul_(block.log_factor).add_(factor)
            block.p.mul_(factor)
            if logp:
                block.p.scatter_add_(1, block.tokens, block.token_gradient)
            if block.slope.numel():
                block.p.mul_(block.slope)

        self._each_block(work)


def _where(mask: Tensor) -> Sequence[Tensor]:
    """The rows where a mask [n, 1] is true, some at a time."""
    index = mask[:, 0].nonzero()[:, 0]
    return index.split(_CHUNK_ROWS[0]) if len(index) else ()


def _small_phi_sum(p: Tensor, t: Tensor) -> Tensor:
    """Σ p (eᵗ − 1 − t) [n, 1] with all its digits, however small t is."""
    # expm1(t) = tanh(t/2)(eᵗ + 1) keeps every digit near 0, in a quarter of expm1's time.
    expm1 = (t * 0.5).tanh_().mul_(t.exp().add_(1))
    return expm1.sub_(t).mul_(p).sum(1, keepdim=True)


def _log(p: Tensor, out: Tensor | None = None) -> Tensor:
    """Log p, finite at p = 0, so that p log p is 0 there."""
    return torch.clamp(p, min=torch.finfo(p.dtype).tiny, out=out).log_()
