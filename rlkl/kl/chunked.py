"""Every divergence on the same positions, from hidden states: logits are never stored [N, V].

The plain formulas of `rlkl.kl.divergences` and `rlkl.kl.adaptive` on a chunk of tokens at a time,
without gradient: for measuring. To train on one of them there is `rlkl.kl.fused_token_loss`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlkl.kl.adaptive import HeadRule, HeadTailGaps, gaps_of_logp, weighted_kl
from rlkl.kl.distillation import DIVERGENCES
from rlkl.kl.divergences import kl_of_logp
from rlkl.kl.fused import ModuleHead, OutputHead, head_logits

Head = OutputHead | ModuleHead
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
    student_head: Head,
    teacher_hidden: Float[Tensor, "N G"],
    teacher_head: Head,
    tokens: Int[Tensor, " N"],
    names: Sequence[str] = tuple(DIVERGENCES),
    *,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
) -> DivergenceStats:
    """Measures divergences on the same positions, at temperature 1 and their default settings.

    (AKL takes `head_mass` and `head_rule`, as the gaps do.)

    Args:
        student_hidden: last hidden states of the student, at the positions that predict `tokens`.
        student_head: its output head.
        teacher_hidden: last hidden states of the teacher; its width may differ.
        teacher_head: its output head.
        tokens: the tokens that stand there.
        names: which of `rlkl.kl.DIVERGENCES`.
        vocab_size: use only the first rows of both heads (the rest pads the vocabulary).
        chunk_size: tokens multiplied at once; default about two million logits.
        head_mass: the teacher's probability that makes the head, for the gaps.
        head_rule: which tokens that is; see `rlkl.kl.adaptive`.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> heads = OutputHead(weight), OutputHead(2 * weight)
        >>> stats = divergence_stats(
        ...     hidden, heads[0], hidden, heads[1], torch.tensor([0, 1]), ["rkl"]
        ... )
        >>> stats.divergences["rkl"]
        tensor([0.1120, 0.1120])
    """
    parts: list[list[Tensor]] = []
    vocab_size = _vocabulary(vocabulary_of(student_head), vocabulary_of(teacher_head), vocab_size)
    heads = _widened(student_head), _widened(teacher_head)
    for rows in _chunks(len(tokens), vocab_size, chunk_size):
        student = _logits(heads[0], student_hidden[rows], vocab_size).log_softmax(-1)
        teacher = _logits(heads[1], teacher_hidden[rows], vocab_size).log_softmax(-1)
        p, index = student.exp(), tokens[rows, None]
        entropy = -torch.where(p > 0, p * student, 0.0).sum(1)
        gaps = gaps_of_logp(student, teacher, head_mass, head_rule)
        values = _divergences(names, student, teacher, gaps.forward_weight)
        token_logp, teacher_logp = student.gather(1, index)[:, 0], teacher.gather(1, index)[:, 0]
        parts.append([token_logp, teacher_logp, entropy, *gaps, *values])
    token_logp, teacher_logp, entropy, head, tail, *values = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    return DivergenceStats(
        divergences=dict(zip(names, values, strict=True)),
        gaps=HeadTailGaps(head, tail),
        student_logp=token_logp,
        teacher_logp=teacher_logp,
        student_entropy=entropy,
    )


def _divergences(names: Sequence[str], student: Tensor, teacher: Tensor, w: Tensor) -> list[Tensor]:
    """Their values from log-probabilities; those made of the two KLs share them."""
    forward, reverse = kl_of_logp(teacher, student), kl_of_logp(student, teacher)
    made = {
        "fkl": forward,
        "rkl": reverse,
        "fkl_rkl": (forward + reverse) / 2,
        "akl": weighted_kl(forward, reverse, w),
        "akl_r": weighted_kl(forward, reverse, 1 - w),
    }
    return [made[n] if n in made else DIVERGENCES[n](student, teacher) for n in names]


def vocabulary_of(head: Head) -> int:
    """Number of logits that a head gives."""
    return head.vocab_size if isinstance(head, ModuleHead) else len(head.weight)


def _vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    if vocab_size is None and student != teacher:
        raise ValueError(
            f"student_head has {student} rows, teacher_head {teacher}: pass vocab_size, the "
            "number of real tokens, if the rest is padding"
        )
    smaller = min(student, teacher)
    if vocab_size is not None and not 0 < vocab_size <= smaller:
        raise ValueError(f"vocab_size={vocab_size}: the smaller head has {smaller} rows")
    return vocab_size or smaller


def _chunks(n: int, vocab_size: int, chunk_size: int | None) -> Iterator[slice]:
    size = chunk_size or max(1, _CHUNK_ELEMENTS // vocab_size)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _widened(head: Head) -> Head:
    """The head in at least float32, so that logits of 16-bit weights are not rounded."""
    if isinstance(head, ModuleHead):
        return head
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    return head._replace(
        weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype)
    )


def _logits(head: Head, hidden: Tensor, vocab_size: int) -> Tensor:
    """[n, V] in at least float32, whatever autocast is on."""
    with torch.autocast(hidden.device.type, enabled=False):
        if isinstance(head, OutputHead):
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        logits = head_logits(head, hidden)[:, :vocab_size]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
