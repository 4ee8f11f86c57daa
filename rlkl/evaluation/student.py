"""A distilled student on held-out prompts: distance from its teacher, overlap, diversity, judge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlkl.evaluation.eval_mode import eval_mode
from rlkl.evaluation.judge import Judge
from rlkl.evaluation.text import distinct_n, rouge_l, self_bleu
from rlkl.kl.adaptive import HeadRule
from rlkl.models import check_apart
from rlkl.rollout import (
    DivergenceRecord,
    Responses,
    divergence_statistics,
    given_responses,
    sample_responses,
    summarise_divergences,
)


@dataclass(frozen=True)
class StudentEvaluation:
    """What a student did on held-out prompts."""

    metrics: dict[str, float]
    """Means and standard errors (``*_se``). ``held_out/*``: on the given completions, names of
    `rlkl.trainers.DISTILL_VOCABULARY`; ``own/*``: the same on the student's samples; ``perplexity``
    of the given completions; ``rouge_l`` (on ``rouge_l_n`` of the ``prompts``), ``distinct_1``,
    ``distinct_2``, ``self_bleu``, ``judge/*`` of the student's samples."""
    samples: Responses
    """The student's responses."""
    records: dict[str, DivergenceRecord]
    """What the means are of, per token: ``held_out`` on the given completions, where there are any,
    and ``own`` on the samples."""


def evaluate_student(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_new_tokens: int,
    *,
    judge: Judge | None = None,
    max_prompt_length: int | None = None,
    temperature: float = 1.0,
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
    seed: int = 0,
    batch_size: int = 64,
    vocab_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> StudentEvaluation:
    """Measures the student on given completions, and on one sample of its own to each prompt.

    Prompts without a completion ("") are sampled from but not measured on. The seed fixes the
    draws: two students are compared on the same noise.

    Args:
        student: the student.
        teacher: its teacher.
        tokenizer: of both.
        prompts: held-out prompts.
        completions: references to them.
        max_new_tokens: longest response, given or sampled.
        judge: scores the samples, where there is one.
        max_prompt_length: longest prompt in tokens.
        temperature: of sampling; divergences are at 1.
        head_mass: probability that makes the teacher's head, in AKL and in the gaps.
        head_rule: which tokens that is; see `rlkl.kl.adaptive`.
        seed: of the draws.
        batch_size: responses per pass.
        vocab_size: real tokens, where the heads are padded to different sizes.
        on_batch: called with the number of responses done, for a progress bar: each prompt counts
            once when sampled, once when the sample is measured, once for its completion if it has
            one, once for the judge's verdict if there is a judge.

    Raises:
        ValueError: a teacher that is the student in another wrapper: they share an adapter, or
            weights that are trained. (The student itself is allowed: its KL from itself is 0.)
    """
    if teacher is not student:
        check_apart(student, teacher, "teacher", "load it a second time")
    with eval_mode(student, teacher):
        answered = [i for i, completion in enumerate(completions) if completion.strip()]
        samples = sample_responses(
            student,
            tokenizer,
            list(prompts),
            max_new_tokens,
            temperature=temperature,
            generator=torch.Generator(device=next(student.parameters()).device).manual_seed(seed),
            batch_size=batch_size,
            max_prompt_length=max_prompt_length,
            vocab_size=vocab_size,
            on_batch=on_batch,
        )
        sets = {"own": samples}
        if answered:
            sets["held_out"] = given_responses(
                tokenizer,
                [prompts[i] for i in answered],
                [completions[i] for i in answered],
                max_new_tokens,
                max_prompt_length=max_prompt_length,
                device=samples.tokens.device,
            )
        metrics, records = {}, {}
        for name, responses in sets.items():
            record = records[name] = divergence_statistics(
                student,
                teacher,
                responses,
                head_mass=head_mass,
                head_rule=head_rule,
                vocab_size=vocab_size,
                batch_size=batch_size,
                on_batch=on_batch,
            )
            metrics |= {f"{name}/{k}": v for k, v in summarise_divergences(record).items()}
    metrics["prompts"] = float(len(samples))
    metrics |= text_metrics(samples.texts, [completions[i] for i in answered], answered)
    if answered:
        nll = torch.tensor(metrics["held_out/student/nll_per_token"])
        metrics["perplexity"] = float(nll.exp())
    if judge is not None:
        judgement = judge(samples.prompts, samples.texts, on_verdict=on_batch)
        metrics["judge/failed"] = float(judgement.failed)
        if judgement.failed < len(samples):
            for name in ("quality", "diversity"):
                mean, stderr = judgement.mean(name)
                metrics |= {f"judge/{name}": float(mean), f"judge/{name}_se": float(stderr)}
    return StudentEvaluation(metrics, samples, records)


def text_metrics(
    samples: Sequence[str], references: Sequence[str], answered: Sequence[int]
) -> dict[str, float]:
    """ROUGE-L against the references of the samples at `answered`, and diversity of all samples.

    A metric that the samples are too short for (no word, no bigram) is left out.
    """
    metrics = {}
    if references:
        mean, stderr = rouge_l([samples[i] for i in answered], references)
        metrics |= {"rouge_l": float(mean), "rouge_l_se": float(stderr)}
        metrics["rouge_l_n"] = float(len(references))
    words = [len(text.split()) for text in samples]
    for n in (1, 2):
        if max(words, default=0) >= n:
            metrics[f"distinct_{n}"] = distinct_n(samples, n)
    if len(samples) > 1:
        metrics["self_bleu"] = self_bleu(samples)
    return metrics
