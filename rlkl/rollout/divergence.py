"""How far a student is from its teacher on responses: every divergence, gaps, log-probabilities."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlkl.kl import (
    DIVERGENCES,
    HeadTailGaps,
    mean_and_stderr,
    per_token_mean_and_stderr,
    sequence_kl,
)
from rlkl.kl.adaptive import HeadRule
from rlkl.kl.chunked import DivergenceStats, divergence_stats
from rlkl.models import output_head, response_hidden
from rlkl.rollout.records import Responses, scatter_tokens


@dataclass(frozen=True)
class DivergenceRecord:
    """What student and teacher say at each response token, in nats; 0 where masked."""

    divergences: dict[str, Tensor]
    """[B, T] by name, of the next-token distributions at temperature 1."""
    gaps: HeadTailGaps
    """[B, T] Σ|q − p| over the teacher's head and tail."""
    student_logp: Tensor
    """[B, T] log-probability of the token under the student."""
    teacher_logp: Tensor
    """[B, T] the same under the teacher."""
    student_entropy: Tensor
    """[B, T] entropy of the student's next-token distribution."""
    mask: Tensor
    """[B, T] bool, of the responses."""

    @classmethod
    def of(cls, stats: DivergenceStats, mask: Tensor) -> "DivergenceRecord":
        """Puts the statistics of N real tokens back in their places."""

        def place(x: Tensor) -> Tensor:
            return scatter_tokens(x.float(), mask)

        return cls(
            divergences={name: place(x) for name, x in stats.divergences.items()},
            gaps=HeadTailGaps(place(stats.gaps.head), place(stats.gaps.tail)),
            student_logp=place(stats.student_logp),
            teacher_logp=place(stats.teacher_logp),
            student_entropy=place(stats.student_entropy),
            mask=mask,
        )


@torch.no_grad()
def divergence_statistics(
    student: nn.Module,
    teacher: nn.Module,
    responses: Responses,
    *,
    names: Sequence[str] = tuple(DIVERGENCES),
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
    vocab_size: int | None = None,
    batch_size: int = 64,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    on_batch: Callable[[int], None] | None = None,
) -> DivergenceRecord:
    """Every divergence of the student from the teacher at every response token.

    One pass of each trunk; the vocabulary is only ever seen in chunks. On responses that the
    teacher wrote, Σ_t of the forward KL estimates D_KL(teacher ‖ student) of the sequence; on the
    student's own, Σ_t of the reverse KL estimates D_KL(student ‖ teacher).

    Args:
        student: the model that learns, in eval mode.
        teacher: the model that it learns from, in eval mode; same tokenizer.
        responses: given or sampled.
        names: which of `rlkl.kl.DIVERGENCES`.
        head_mass: probability that makes the teacher's head.
        head_rule: which tokens that is; see `rlkl.kl.adaptive`.
        vocab_size: real tokens, where the heads are padded to different sizes.
        batch_size: responses per pass.
        autocast: makes the context in which the trunks run: their precision.
        on_batch: called with the number of responses of each batch, for a progress bar.
    """
    parts = []
    for rows in torch.arange(len(responses)).split(batch_size):
        batch = responses.rows(rows)
        length = batch.tokens.shape[1]
        with autocast():
            student_hidden, teacher_hidden = (
                response_hidden(model, batch.input_ids, batch.attention_mask, length)[batch.mask]
                for model in (student, teacher)
            )
        parts.append(
            hidden_statistics(
                (student, student_hidden),
                (teacher, teacher_hidden),
                batch.tokens[batch.mask],
                names=names,
                head_mass=head_mass,
                head_rule=head_rule,
                vocab_size=vocab_size,
            )
        )
        if on_batch is not None:
            on_batch(len(batch))
    return DivergenceRecord.of(_joined(parts), responses.mask)


def hidden_statistics(
    student: tuple[nn.Module, Tensor],
    teacher: tuple[nn.Module, Tensor],
    tokens: Tensor,
    *,
    names: Sequence[str] = tuple(DIVERGENCES),
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
    vocab_size: int | None = None,
) -> DivergenceStats:
    """The same from hidden states [N, H] at hand, each beside its model."""
    return divergence_stats(
        student[1],
        output_head(student[0]),
        teacher[1],
        output_head(teacher[0]),
        tokens,
        names,
        vocab_size=vocab_size,
        head_mass=head_mass,
        head_rule=head_rule,
    )


def summarise_divergences(record: DivergenceRecord) -> dict[str, float]:
    """Means over the responses with standard errors (``*_se``), by the vocabulary's names."""
    mask, metrics = record.mask, dict[str, float]()

    def put(name: str, mean: Tensor, stderr: Tensor) -> None:
        metrics[name], metrics[f"{name}_se"] = float(mean), float(stderr)

    per_token = {f"divergence/{name}": k for name, k in record.divergences.items()}
    per_token |= {
        "gap/head": record.gaps.head,
        "gap/tail": record.gaps.tail,
        "akl/forward_weight": record.gaps.forward_weight,
        "student/nll_per_token": -record.student_logp,
        "teacher/nll_per_token": -record.teacher_logp,
        "student/entropy_per_token": record.student_entropy,
    }
    for name, values in per_token.items():
        put(name, *per_token_mean_and_stderr(values, mask))
    for name in ("fkl", "rkl"):
        if name in record.divergences:
            per_response = sequence_kl(record.divergences[name], mask)
            put(f"divergence/{name}_per_response", *mean_and_stderr(per_response))
    put("response/length", *mean_and_stderr(mask.sum(1).float()))
    return metrics


def _joined(parts: list[DivergenceStats]) -> DivergenceStats:
    names = parts[0].divergences
    return DivergenceStats(
        divergences={n: torch.cat([part.divergences[n] for part in parts]) for n in names},
        gaps=HeadTailGaps(*(torch.cat(x) for x in zip(*(p.gaps for p in parts), strict=True))),
        student_logp=torch.cat([part.student_logp for part in parts]),
        teacher_logp=torch.cat([part.teacher_logp for part in parts]),
        student_entropy=torch.cat([part.student_entropy for part in parts]),
    )
