"""Every divergence on the same positions, from hidden states: logits are never stored [N, V].

Reverse KL, log-probabilities and entropy are the fused kernel's; the others are the plain formulas
of `rlkl.kl.divergences` and `rlkl.kl.adaptive` on the logits of its chunks, without gradient: for
measuring. To train on one of them there is `rlkl.kl.fused_token_loss`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlkl.kl.adaptive import HeadRule, HeadTailGaps, gaps_of_logp, weighted_kl
from rlkl.kl.distillation import DIVERGENCES
from rlkl.kl.divergences import kl_of_logp
from rlkl.kl.fused import ModuleHead, OutputHead, fused_token_stats

Head = OutputHead | ModuleHead
_CHUNK_ELEMENTS = 2_000_000
# The divergences that follow from forward and reverse KL and the weight of AKL.
_MADE_OF_KLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fkl": lambda forward, reverse, w: forward,
    "rkl": lambda forward, reverse, w: reverse,
    "fkl_rkl": lambda forward, reverse, w: (forward + reverse) / 2,
    "akl": weighted_kl,
    "akl_r": lambda forward, reverse, w: weighted_kl(forward, reverse, 1 - w),
}


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
    vocab_size = _vocabulary(vocabulary_of(student_head), vocabulary_of(teacher_head), vocab_size)
    parts: list[list[Tensor]] = []

    def measure(_: slice, student_logits: Tensor, teacher_logits: Tensor) -> None:
        student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        gaps = gaps_of_logp(student, teacher, head_mass, head_rule)
        others = [DIVERGENCES[n](student, teacher) for n in names if n not in _MADE_OF_KLS]
        parts.append([*gaps, kl_of_logp(teacher, student), *others])

    stats = fused_token_stats(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        tokens,
        vocab_size=vocab_size,
        chunk_size=max(1, _CHUNK_ELEMENTS // vocab_size) if chunk_size is None else chunk_size,
        on_logits=measure,
    )
    if not len(tokens):  # of no chunk: the same, empty
        measure(slice(0), *stats.kl.new_empty(2, 0, vocab_size))
    head, tail, forward, *values = (torch.cat(column) for column in zip(*parts, strict=True))
    gaps, others = HeadTailGaps(head, tail), iter(values)
    return DivergenceStats(
        divergences={
            name: made(forward, stats.kl, gaps.forward_weight)
            if (made := _MADE_OF_KLS.get(name))
            else next(others)
            for name in names
        },
        gaps=gaps,
        student_logp=stats.policy_logp,
        teacher_logp=stats.ref_logp,
        student_entropy=stats.entropy,
    )


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
