"""Per-token statistics of a policy and its reference from hidden states, without the [N, V] logits.

The exact token KL needs two next-token distributions. Here the tokens are walked in chunks: a chunk's
logits are multiplied into two [chunk, V] buffers, reduced to four numbers per token, overwritten in
place by the gradient of the logits, and multiplied back into the gradients of hidden states and head.
Memory beyond inputs and their gradients is O(chunk · V), whatever the number of tokens.

With a, b the logits of policy and reference, p the policy's softmax and t = (b − a) − E_p[b − a],

    D_KL(policy ‖ ref) = log E_p[eᵗ] = log(1 + E_p[φ(t)]),   φ(t) = eᵗ − 1 − t ≥ 0
    ∂D_KL/∂a           = −p ⊙ t
    log q(y)           = log p(y) + t_y − D_KL

The first line is Σ p·d + Σ p·expm1(−d) of d = log p − log q = D_KL − t with the normaliser solved for:
only E_p[t] = 0 is used, so an error δ of that mean enters the KL as δ²/2 + δ·D_KL, and the reference's
own normaliser is never formed. Identical models give t = 0, hence exactly 0 in value and gradient.

    ∂log p(y)/∂a = onehot(y) − p,     ∂H/∂a = −p ⊙ (log p + H)
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "TokenLogp",
    "TokenStats",
    "fused_logp_loss",
    "fused_token_logp",
    "fused_token_loss",
    "fused_token_stats",
]

# A chunk's buffer holds about this many logits (26 MB in float32): enough rows to feed a matrix multiply.
_CHUNK_ELEMENTS = 6_500_000
_CHUNK_ROWS = (64, 512)
# Element-wise work runs on row blocks of this many logits per thread, so that four of them fit an L2 cache.
_BLOCK_ELEMENTS = 131_072
# Weights are read in slices of this many rows: faster for BLAS, and a 16-bit head is never widened whole.
_VOCAB_SLICE = 8192
# Above this t the policy's probability may have underflowed where the reference still has mass.
_MAX_T = 60.0


class TokenStats(NamedTuple):
    """What one sampled token and the two distributions at its position say, in nats.

    Float32 (float64 if any input is float64).
    """

    policy_logp: Float[Tensor, " N"]
    """log π(y): log-probability of the token under the policy."""
    ref_logp: Float[Tensor, " N"]
    """log q(y): log-probability of the token under the reference. Constant: no gradient."""
    kl: Float[Tensor, " N"]
    """D_KL(policy ‖ ref) of the next-token distributions; at least 0."""
    entropy: Float[Tensor, " N"]
    """Entropy of the policy's next-token distribution."""


class TokenLogp(NamedTuple):
    """The policy's part of `TokenStats`, in nats."""

    policy_logp: Float[Tensor, " N"]
    """log π(y): log-probability of the token under the policy."""
    entropy: Float[Tensor, " N"]
    """Entropy of the policy's next-token distribution."""


def fused_token_stats(
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "N G"],
    ref_head: Float[Tensor, "W G"],
    tokens: Int[Tensor, " N"],
    *,
    policy_bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " W"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> TokenStats:
    """Log-probabilities, exact D_KL(policy ‖ ref) and entropy per token, for any later use.

    Differentiable in policy_hidden, policy_head and policy_bias through policy_logp, kl and entropy; the
    reference is treated as constant. The backward pass multiplies the logits again; `fused_token_loss`
    saves that when the loss is known now.

    Valid for tokens sampled at this temperature from the untruncated policy. A token KL is +inf, and its
    gradient NaN, where the reference forbids (bias −inf) what the policy allows.

    Args:
        policy_hidden: last hidden states of the policy at the positions that predict `tokens`.
        policy_head: rows of the policy's output embedding.
        ref_hidden: last hidden states of the reference; its width may differ.
        ref_head: rows of the reference's output embedding.
        tokens: the sampled tokens.
        policy_bias: added to the policy's logits; −inf forbids a token.
        ref_bias: added to the reference's logits; −inf forbids a token.
        temperature: sampling temperature; all logits are divided by it.
        vocab_size: use only the first rows of both heads (vocabularies padded to different sizes).
        chunk_size: tokens multiplied at once; default about 6.5 million logits.
        gemm_dtype: torch.bfloat16 rounds the factors of every matrix product to bfloat16 (CPU); sums and
            logits stay float32. Default: products of the inputs' own precision.

    Returns:
        TokenStats of [N] tensors, nats per token.

    Raises:
        ValueError: shapes, vocabularies, tokens, temperature or gemm_dtype do not fit.

    Example:
        >>> import torch
        >>> hidden, head = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> stats = fused_token_stats(hidden, head, hidden, 2 * head, torch.tensor([0, 1]))
        >>> stats.kl
        tensor([0.1120, 0.1120])
        >>> fused_token_stats(hidden, head, hidden, head, torch.tensor([0, 1])).kl
        tensor([0., 0.])
    """
    problem = _Problem.of(
        (policy_hidden, policy_head, policy_bias),
        (ref_hidden, ref_head, ref_bias),
        tokens, temperature, vocab_size, chunk_size, gemm_dtype,
    )  # fmt: skip
    return TokenStats(*_Statistics.apply(problem, policy_hidden, policy_head, policy_bias))


def fused_token_logp(
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"],
    tokens: Int[Tensor, " N"],
    *,
    policy_bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> TokenLogp:
    """Log-probability and entropy per token of one model: `fused_token_stats` without a reference.

    Differentiable in policy_hidden, policy_head and policy_bias. Arguments, validity and errors as there.

    Returns:
        TokenLogp of [N] tensors, nats per token.

    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(1, 2), torch.ones(4, 2)
        >>> fused_token_logp(hidden, head, torch.tensor([3])).entropy
        tensor([1.3863])
    """
    problem = _Problem.of(
        (policy_hidden, policy_head, policy_bias),
        None, tokens, temperature, vocab_size, chunk_size, gemm_dtype,
    )  # fmt: skip
    return TokenLogp(*_Statistics.apply(problem, policy_hidden, policy_head, policy_bias))


def fused_token_loss(
    loss_fn: Callable[..., Tensor],
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "N G"],
    ref_head: Float[Tensor, "W G"],
    tokens: Int[Tensor, " N"],
    *per_token: Tensor,
    policy_bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " W"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, ""], TokenStats]:
    """Sum over chunks of loss_fn(stats, *per_token), with its gradient made in the same pass.

    The logits are multiplied once: when this returns, the gradients of policy_hidden, policy_head and
    policy_bias are ready, and `loss.backward()` hands them out times the upstream scalar. Under
    torch.no_grad only the value is computed.

    The gradient flows through the statistics alone: the tensors in per_token are constants, and anything
    loss_fn closes over gets no gradient. Arguments not listed are those of `fused_token_stats`.

    Args:
        loss_fn: called on each chunk with TokenStats of [n] tensors and the [n, ...] slices of per_token;
            returns a scalar that is a *sum* over tokens (for a mean, divide by the count of all tokens).
        policy_hidden: last hidden states of the policy.
        policy_head: rows of the policy's output embedding.
        ref_hidden: last hidden states of the reference.
        ref_head: rows of the reference's output embedding.
        tokens: the sampled tokens.
        *per_token: tensors with N rows (advantages, old log-probabilities, ...).
        policy_bias: added to the policy's logits.
        ref_bias: added to the reference's logits.
        temperature: sampling temperature.
        vocab_size: use only the first rows of both heads.
        chunk_size: tokens multiplied at once.
        gemm_dtype: torch.bfloat16 rounds the factors of every matrix product to bfloat16 (CPU).

    Returns:
        The loss (a scalar, differentiable once) and the detached TokenStats of all tokens.

    Raises:
        ValueError: as `fused_token_stats`; also if per_token has other lengths or requires a gradient.

    Example:
        >>> import torch
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> weight = torch.tensor([1.0, 0.5])
        >>> def penalty(stats, weight):
        ...     return (weight * stats.kl).sum()
        >>> loss, stats = fused_token_loss(
        ...     penalty, hidden, head, hidden.detach(), 2 * head, torch.tensor([0, 1]), weight)
        >>> loss.backward()
        >>> stats.kl, hidden.grad.shape
        (tensor([0.1120, 0.1120]), torch.Size([2, 2]))
    """
    problem = _Problem.of(
        (policy_hidden, policy_head, policy_bias),
        (ref_hidden, ref_head, ref_bias),
        tokens, temperature, vocab_size, chunk_size, gemm_dtype,
    )  # fmt: skip
    chunk_loss, differentiate = problem.chunk_loss(loss_fn, per_token), torch.is_grad_enabled()
    loss, *stats = _Loss.apply(
        problem, chunk_loss, differentiate, policy_hidden, policy_head, policy_bias
    )
    return loss, TokenStats(*stats)


def fused_logp_loss(
    loss_fn: Callable[..., Tensor],
    policy_hidden: Float[Tensor, "N H"],
    policy_head: Float[Tensor, "V H"],
    tokens: Int[Tensor, " N"],
    *per_token: Tensor,
    policy_bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, ""], TokenLogp]:
    """`fused_token_loss` without a reference: loss_fn gets a TokenLogp (PPO with a sampled KL penalty).

    Returns:
        The loss (a scalar, differentiable once) and the detached TokenLogp of all tokens.

    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(1, 2, requires_grad=True), torch.eye(2)
        >>> loss, _ = fused_logp_loss(lambda s: -s.policy_logp.sum(), hidden, head, torch.tensor([0]))
        >>> loss.backward()
        >>> hidden.grad
        tensor([[-0.5000,  0.5000]])
    """
    problem = _Problem.of(
        (policy_hidden, policy_head, policy_bias),
        None, tokens, temperature, vocab_size, chunk_size, gemm_dtype,
    )  # fmt: skip
    chunk_loss, differentiate = problem.chunk_loss(loss_fn, per_token), torch.is_grad_enabled()
    loss, *stats = _Loss.apply(
        problem, chunk_loss, differentiate, policy_hidden, policy_head, policy_bias
    )
    return loss, TokenLogp(*stats)


# ------------------------------------------------------------------------------------------------- autograd


class _Statistics(torch.autograd.Function):
    """Statistics now; gradients for whatever upstream arrives, by a second sweep."""

    @staticmethod
    def forward(ctx, problem, hidden, weight, bias):
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        ctx.save_for_backward(hidden, weight, bias)
        stats = problem.sweep()
        if problem.ref is not None:
            ctx.mark_non_differentiable(stats[TokenStats._fields.index("ref_logp")])
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        problem = ctx.problem
        inputs = ctx.saved_tensors  # reading them raises if one was modified in place since forward
        given = {k: g for k, g in zip(problem.fields, upstream, strict=True) if g is not None}

        def slices(rows: slice, stats: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return {name: g[rows] for name, g in given.items()}

        grads = _Gradients(problem.policy, inputs, ctx.needs_input_grad[1:])
        problem.sweep(slices, grads)
        return None, *grads.in_dtype_of(inputs)


class _Loss(torch.autograd.Function):
    """Loss and gradients in one sweep; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx, problem, chunk_loss, differentiate, hidden, weight, bias):
        inputs, needed = (hidden, weight, bias), ctx.needs_input_grad[3:]
        grads = None
        if differentiate and any(needed):
            grads = _Gradients(problem.policy, inputs, needed)
        stats = problem.sweep(chunk_loss, grads)
        if grads is not None:
            ctx.save_for_backward(*grads.in_dtype_of(inputs))
        ctx.mark_non_differentiable(*stats)
        return chunk_loss.total, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        grads = ctx.saved_tensors
        if upstream != 1:
            grads = [None if g is None else g * upstream.to(g.dtype) for g in grads]
        return None, None, None, *grads


class _ChunkLoss:
    """loss_fn on one chunk: adds its value to `total`, returns its gradient per statistic and token."""

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        record: type[TokenStats] | type[TokenLogp],
        per_token: tuple[Tensor, ...],
        total: Tensor,
    ):
        self.loss_fn, self.record, self.per_token, self.total = loss_fn, record, per_token, total

    def __call__(self, rows: slice, stats: tuple[Tensor, ...]) -> dict[str, Tensor]:
        leaves = [x.detach() for x in stats]
        inputs = {
            name: x.requires_grad_()
            for name, x in zip(self.record._fields, leaves, strict=True)
            if name != "ref_logp"
        }
        with torch.enable_grad():
            loss = self.loss_fn(self.record(*leaves), *(x[rows] for x in self.per_token))
        if loss.shape != ():
            raise ValueError(
                f"loss_fn returned shape {tuple(loss.shape)}: return the sum over the chunk's tokens"
            )
        self.total += loss.detach()
        if not loss.requires_grad:  # this chunk's value does not depend on the statistics
            return {}
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {name: g for name, g in zip(inputs, grads, strict=True) if g is not None}


# --------------------------------------------------------------------------------------------------- engine


@dataclass(frozen=True)
class _Head:
    """One model's logits, scale · (hidden weightᵀ + bias), multiplied chunk by chunk in `dtype`."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    dtype: torch.dtype
    gemm_dtype: torch.dtype | None

    def scaled_hidden(self, rows: slice | Tensor) -> Tensor:
        hidden = self.hidden[rows].to(self.dtype)
        return hidden if self.scale == 1.0 else hidden * self.scale

    def weight_slices(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.weight.shape[0], _VOCAB_SLICE):
            columns = slice(start, start + _VOCAB_SLICE)
            yield columns, self.weight[columns].to(self.dtype)

    def logits(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        hidden = self.scaled_hidden(rows)
        # Factors that are bfloat16 already lose nothing in a bfloat16 product with a float32 sum.
        lossless = self.hidden.dtype == self.weight.dtype == torch.bfloat16 and self.scale == 1.0
        with _gemm_precision(torch.bfloat16 if lossless else self.gemm_dtype):
            for columns, weight in self.weight_slices():
                torch.mm(hidden, weight.t(), out=out[:, columns])
        if self.bias is not None:
            out.add_(self.bias.to(self.dtype) * self.scale)
        return out


class _Gradients:
    """Sums of the gradients of hidden, weight and bias, for those that need one."""

    def __init__(self, head: _Head, inputs: Sequence[Tensor | None], needed: Sequence[bool]):
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
        return tuple(
            None if total is None or x is None else total.to(x.dtype)
            for total, x in zip((self.hidden, self.weight, self.bias), inputs, strict=True)
        )


@contextmanager
def _gemm_precision(dtype: torch.dtype | None) -> Iterator[None]:
    """Float32 products whose factors oneDNN rounds to bfloat16 (CPU); sums and output stay float32.

    torch.mm of bfloat16 tensors would round its output as well, which drowns a small KL.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class _Problem:
    """The checked arguments of one call, and the sweep over its chunks."""

    policy: _Head
    ref: _Head | None
    tokens: Tensor  # [N]
    chunk_size: int

    @classmethod
    def of(
        cls,
        policy: tuple[Tensor, Tensor, Tensor | None],
        ref: tuple[Tensor, Tensor, Tensor | None] | None,
        tokens: Tensor,
        temperature: float,
        vocab_size: int | None,
        chunk_size: int | None,
        gemm_dtype: torch.dtype | None,
    ) -> "_Problem":
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
                f"gemm_dtype={gemm_dtype} works on float32 and 16-bit CPU tensors, got {dtype} on "
                f"{tokens.device.type}: leave it None (on CUDA, torch.backends.cuda.matmul.fp32_precision)"
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
            heads.append(_Head(hidden.detach(), weight, bias, 1 / temperature, dtype, gemm_dtype))
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < vocab):
            raise ValueError(
                f"tokens lie in [{int(tokens.min())}, {int(tokens.max())}]: expected [0, {vocab})"
            )
        if chunk_size is None:
            chunk_size = min(max(_CHUNK_ELEMENTS // vocab, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])
        chunk_size = min(chunk_size, max(tokens.shape[0], 1))
        return cls(heads[0], heads[1] if len(heads) == 2 else None, tokens, chunk_size)

    @property
    def fields(self) -> tuple[str, ...]:
        return TokenLogp._fields if self.ref is None else TokenStats._fields

    def chunk_loss(
        self, loss_fn: Callable[..., Tensor], per_token: tuple[Tensor, ...]
    ) -> _ChunkLoss:
        for i, x in enumerate(per_token):
            if x.shape[:1] != self.tokens.shape:
                raise ValueError(
                    f"per_token[{i}] has shape {tuple(x.shape)}: expected {self.tokens.shape[0]} rows"
                )
            if x.requires_grad:
                raise ValueError(
                    f"per_token[{i}] requires a gradient, which fused losses do not give: detach it"
                )
        record = TokenLogp if self.ref is None else TokenStats
        total = torch.zeros((), dtype=self.policy.dtype, device=self.tokens.device)
        return _ChunkLoss(loss_fn, record, per_token, total)

    def sweep(
        self,
        upstream: Callable[[slice, tuple[Tensor, ...]], dict[str, Tensor]] | None = None,
        grads: _Gradients | None = None,
    ) -> tuple[Tensor, ...]:
        """All tokens' statistics; with `upstream` (chunk -> gradient per statistic), fill `grads` too."""
        n, dtype, device = len(self.tokens), self.policy.dtype, self.tokens.device
        stats = tuple(torch.empty(n, dtype=dtype, device=device) for _ in self.fields)
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            _Workers(device) as workers,
        ):
            chunk = _Chunk(self, workers)
            for start in range(0, n, self.chunk_size):
                rows = slice(start, min(start + self.chunk_size, n))
                part = tuple(out[rows] for out in stats)
                chunk.read(rows, part)
                given = {} if upstream is None else upstream(rows, part)
                if grads is not None and given:
                    grads.add(rows, chunk.logit_gradient(part, given))
        return stats


class _Workers:
    """Threads that each run element-wise operations of their own, with no barrier between operations.

    One parallel region per operation costs more than it gains on cache-sized blocks, and stalls on every
    barrier when the machine is busy.
    """

    def __init__(self, device: torch.device):
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.pool = None
        if self.count > 1:
            started = threading.Barrier(self.count + 1)
            self.pool = ThreadPoolExecutor(self.count)
            for _ in range(self.count):
                self.pool.submit(self._start, started)
            started.wait()
            torch.set_num_threads(self.count)  # MKL's setting is the process's, not the thread's

    @staticmethod
    def _start(started: threading.Barrier) -> None:
        torch.set_num_threads(1)
        started.wait()

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def run(self, work: Callable[[int], None]) -> None:
        """work(0), ..., work(count − 1), at the same time."""
        if self.pool is None:
            work(0)
            return
        inference = torch.is_inference_mode_enabled()

        def guarded(worker: int) -> None:  # the grad and inference modes belong to each thread
            with torch.inference_mode(inference), torch.no_grad():
                work(worker)

        list(self.pool.map(guarded, range(self.count)))


class _Chunk:
    """The buffers of one chunk: first logits, then p and t of the module docstring, then the gradient.

    p is kept as exp(a − max) beside its row sum, which saves the pass that would divide it. Passes over
    logits run block by block of a few rows; everything per token runs once for the whole chunk.
    """

    def __init__(self, problem: _Problem, workers: _Workers):
        self.problem, self.workers = problem, workers
        size, (vocab, like) = problem.chunk_size, (len(problem.policy.weight), problem.tokens)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=problem.policy.dtype, device=like.device)

        self.p = empty(size, vocab)
        self.t = empty(size if problem.ref is not None else 0, vocab)
        self.rows, self.tokens = slice(0, 0), like
        self.peak, self.p_sum, self.p_mean, self.t_mean, self.phi_sum, self.ratio = empty(6, size, 1)
        block = max(1, _BLOCK_ELEMENTS // vocab) if like.device.type == "cpu" else size
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
        log_sum = self.p_sum[:n].log()
        logp = token_logit - self.peak[:n] - log_sum
        entropy = log_sum - self.p_mean[:n] / self.p_sum[:n]
        if problem.ref is None:
            values = logp, entropy
        else:
            # φ ≥ 0: the clamp removes rounding (below 1e-13 nats), and keeps NaN.
            kl = (self.phi_sum[:n] / self.p_sum[:n]).log1p_().clamp_(min=0)
            ref_logp = logp + self.t[:n].gather(1, self.tokens) - kl
            far = ~(self.ratio[:n] < math.exp(_MAX_T))[:, 0]  # also where it is NaN
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
        torch.sum(x.mul_(p), 1, keepdim=True, out=self.p_mean[block])

    def _joint_pass(self, block: slice, scratch: Tensor) -> None:
        p, t, (x, y) = self.p[block], self.t[block], scratch
        t.sub_(p)
        self._policy_pass(block, scratch)
        mean = torch.sum(torch.mul(p, t, out=x), 1, keepdim=True, out=self.t_mean[block])
        t.sub_(mean.div_(self.p_sum[block]))
        torch.exp(t, out=x)
        torch.amax(x, 1, keepdim=True, out=self.ratio[block])
        # expm1(t) = tanh(t/2)(eᵗ + 1) keeps every digit near 0, in a quarter of expm1's time.
        torch.mul(t, 0.5, out=y).tanh_().addcmul_(y, x).sub_(t)
        torch.sum(y.mul_(p), 1, keepdim=True, out=self.phi_sum[block])

    def _far_divergence(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(D_KL, log q(y)) of rows where p underflows and q does not, or where tokens are forbidden.

        There Σ p·d + Σ p·expm1(−d) is summed as written, from logits multiplied anew.
        """
        problem, rows = self.problem, index + self.rows.start
        a, b = (
            head.logits(rows, self.p.new_empty(len(rows), self.p.shape[1]))
            for head in (problem.policy, problem.ref)
            if head is not None
        )
        a.sub_(a_peak := a.amax(1, keepdim=True))
        b.sub_(b_peak := b.amax(1, keepdim=True))
        p, q = a.exp(), b.exp()
        p_sum, q_sum = p.sum(1, keepdim=True), q.sum(1, keepdim=True)
        p.div_(p_sum)
        q.div_(q_sum)
        d = torch.where(p > 0, (a - b) - (p_sum / q_sum).log(), 0.0)
        # Where d < −1 nothing cancels in q − p, and expm1(−d) could overflow.
        rest = torch.where((p > 0) & (d > -1), p * torch.expm1(-d), q - p)
        kl = (p * d + rest).sum(1, keepdim=True).clamp_(min=0)
        self.p[index], self.p_sum[index] = p, 1.0
        self.t[index] = torch.where(p > 0, kl - d, 0.0)
        return kl, b.gather(1, problem.tokens[rows, None]) - q_sum.log()

    def logit_gradient(self, stats: tuple[Tensor, ...], given: dict[str, Tensor]) -> Tensor:
        """Σ over statistics of upstream · ∂statistic/∂a for the chunk last read: [n, V], in p's buffer.

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
                log_p = torch.clamp(p, min=torch.finfo(p.dtype).tiny, out=scratch[0]).log_()
                factor = log_p.mul_(log_slope[block]).add_(factor)
            p.mul_(factor)

        self._each_block(work)
        gradient = self.p[:n]
        if g_logp is not None:
            gradient.scatter_add_(1, self.tokens, g_logp[:, None].to(gradient.dtype))
        return gradient
