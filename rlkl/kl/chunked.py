"""Any divergence from hidden states, a chunk of tokens at a time: logits are never stored [N, V].

The plain way, by autograd on each chunk: it takes any function of two logits, and is what the fused
kernel (`rlkl.kl.fused`) is checked against. Memory beyond inputs and their gradients is that of one
chunk: a few dozen times chunk_size · V.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkl.kl.adaptive import HeadRule, HeadTailGaps, head_tail_gaps
from rlkl.kl.fused import TokenStats

_CHUNK_ELEMENTS = 2_000_000


class DivergenceStats(NamedTuple):
    """What student and teacher say at each of N positions; nats per token, no gradient."""

    divergences: dict[str, Float[Tensor, " N"]]
    """The value of each divergence that was asked for, by name."""
    gaps: HeadTailGaps
    """Σ |q - p| over head and tail of the teacher, and with them the weights of AKL."""
    student_logp: Float[Tensor, " N"]
    """Log-probability of the token under the student."""
    teacher_logp: Float[Tensor, " N"]
    """Log-probability of the token under the teacher."""
    student_entropy: Float[Tensor, " N"]
    """Entropy of the student's next-token distribution."""


@torch.no_grad()
def divergence_stats(
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N G"],
    teacher_head: Float[Tensor, "W G"],
    tokens: Int[Tensor, " N"],
    divergences: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    *,
    student_bias: Float[Tensor, " V"] | None = None,
    teacher_bias: Float[Tensor, " W"] | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
) -> DivergenceStats:
    """Measures every one of `divergences` on the same positions, at temperature 1.

    Args:
        student_hidden: last hidden states of the student, at the positions that predict `tokens`.
        student_head: rows of the student's output embedding.
        teacher_hidden: last hidden states of the teacher; its width may differ.
        teacher_head: rows of the teacher's output embedding.
        tokens: the tokens that stand there.
        divergences: functions of `[n, V]` logits of student and teacher.
        student_bias: added to the student's logits.
        teacher_bias: added to the teacher's logits.
        vocab_size: use only the first rows of both heads (the rest pads the vocabulary).
        chunk_size: tokens multiplied at once; default about two million logits.
        head_mass: the teacher's probability that makes the head, for the gaps.
        head_rule: which tokens that is; see `rlkl.kl.adaptive`.

    Example:
        >>> from rlkl.kl import DIVERGENCES
        >>> hidden, head = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> stats = divergence_stats(
        ...     hidden, head, hidden, 2 * head, torch.tensor([0, 1]), {"rkl": DIVERGENCES["rkl"]}
        ... )
        >>> stats.divergences["rkl"]
        tensor([0.1120, 0.1120])
    """
    parts: list[list[Tensor]] = []
    vocab_size = _vocabulary(student_head, teacher_head, vocab_size)
    for rows in _chunks(len(tokens), vocab_size, chunk_size):
        student = _logits(student_hidden[rows], student_head, student_bias, vocab_size)
        teacher = _logits(teacher_hidden[rows], teacher_head, teacher_bias, vocab_size)
        stats = _token_stats(student, teacher, tokens[rows], student.new_zeros(len(student)))
        gaps = head_tail_gaps(student, teacher, head_mass=head_mass, head_rule=head_rule)
        values = [divergence(student, teacher) for divergence in divergences.values()]
        parts.append([stats.policy_logp, stats.ref_logp, stats.entropy, *gaps, *values])
    logp, ref_logp, entropy, head, tail, *values = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    return DivergenceStats(
        divergences=dict(zip(divergences, values, strict=True)),
        gaps=HeadTailGaps(head, tail),
        student_logp=logp,
        teacher_logp=ref_logp,
        student_entropy=entropy,
    )


def chunked_token_loss(
    loss_fn: Callable[..., Tensor],
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N G"],
    teacher_head: Float[Tensor, "W G"],
    tokens: Int[Tensor, " N"],
    *per_token: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    student_bias: Float[Tensor, " V"] | None = None,
    teacher_bias: Float[Tensor, " W"] | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], TokenStats]:
    """Σ over chunks of loss_fn(stats, *per_token), with its gradient made in the same pass.

    As `rlkl.kl.fused_token_loss`, for any divergence of two logits: `stats.kl` is its value per
    token, both logits divided by `temperature` (as they are in all of `stats`). Differentiable once
    in student_hidden, student_head and student_bias.

    Returns:
        The loss, a scalar, and the detached TokenStats `[N]` of student (policy) and teacher (ref).

    Raises:
        ValueError: loss_fn does not return a scalar; the heads differ in size and no vocab_size is
            given.

    Example:
        >>> from rlkl.kl import DIVERGENCES
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> loss, stats = chunked_token_loss(
        ...     lambda stats: stats.kl.sum(), hidden, head, hidden.detach(), 2 * head,
        ...     torch.tensor([0, 1]), divergence=DIVERGENCES["fkl"],
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 4), hidden.grad.shape
        (0.1978, torch.Size([2, 2]))
    """
    vocab_size = _vocabulary(student_head, teacher_head, vocab_size)

    def chunk_loss(
        rows: slice, hidden: Tensor, head: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, TokenStats]:
        with torch.no_grad():
            teacher = _logits(teacher_hidden[rows], teacher_head, teacher_bias, vocab_size)
        student = _logits(hidden, head, bias, vocab_size) / temperature
        teacher = teacher / temperature
        value = divergence(student, teacher)
        stats = _token_stats(student, teacher, tokens[rows], value)
        loss = loss_fn(stats, *(x[rows] for x in per_token))
        if loss.shape != ():
            raise ValueError(
                f"loss_fn returned shape {tuple(loss.shape)}: return the sum over its tokens"
            )
        return loss, TokenStats(*(x.detach() for x in stats))

    chunks = list(_chunks(len(tokens), vocab_size, chunk_size))
    loss, *stats = _Chunked.apply(
        chunk_loss, chunks, torch.is_grad_enabled(), student_hidden, student_head, student_bias
    )
    return loss, TokenStats(*stats)


class _Chunked(torch.autograd.Function):
    """Loss and gradients chunk by chunk; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx, chunk_loss, chunks, differentiate, hidden, head, bias):
        needed = [n and differentiate for n in ctx.needs_input_grad[3:]]
        inputs = (hidden, head, bias)
        sums = [torch.zeros_like(x) if n else None for n, x in zip(needed, inputs, strict=True)]
        total, parts = 0.0, []
        for rows in chunks:
            leaves = [None if x is None else x.detach() for x in (hidden[rows], head, bias)]
            wanted = [x.requires_grad_() for n, x in zip(needed, leaves, strict=True) if n]
            with torch.set_grad_enabled(bool(wanted)):
                loss, stats = chunk_loss(rows, *leaves)
            total = total + loss.detach()
            parts.append(stats)
            if wanted and loss.requires_grad:
                found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
                for i, n in enumerate(needed):
                    gradient = next(found) if n else None
                    if gradient is not None:
                        place = sums[i][rows] if i == 0 else sums[i]
                        place += gradient
        ctx.save_for_backward(*sums)
        stats = [torch.cat(column) for column in zip(*parts, strict=True)]
        ctx.mark_non_differentiable(*stats)
        return total, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        scale = upstream[0]
        gradients = [None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors]
        return None, None, None, *gradients


def _vocabulary(student_head: Tensor, teacher_head: Tensor, vocab_size: int | None) -> int:
    sizes = len(student_head), len(teacher_head)
    if vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"student_head has {sizes[0]} rows, teacher_head {sizes[1]}: pass vocab_size, the "
            "number of real tokens, if the rest is padding"
        )
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise ValueError(f"vocab_size={vocab_size}: the smaller head has {min(sizes)} rows")
    return vocab_size or sizes[0]


def _chunks(n: int, vocab_size: int, chunk_size: int | None) -> Iterator[slice]:
    size = chunk_size or max(1, _CHUNK_ELEMENTS // vocab_size)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, vocab_size: int) -> Tensor:
    """[n, V] in at least float32, whatever autocast is on."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ head[:vocab_size].to(dtype).T
    return logits if bias is None else logits + bias[:vocab_size].to(dtype)


def _token_stats(student: Tensor, teacher: Tensor, tokens: Tensor, value: Tensor) -> TokenStats:
    logp = student.log_softmax(-1)
    index = tokens[:, None]
    p = logp.exp()
    return TokenStats(
        policy_logp=logp.gather(1, index)[:, 0],
        ref_logp=teacher.log_softmax(-1).gather(1, index)[:, 0],
        kl=value,
        entropy=-torch.where(p > 0, p * logp, 0.0).sum(1),
    )
