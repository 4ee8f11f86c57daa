"""The KL between two language models, estimated: sample, measure, add up, until there is enough."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlkl.evaluation.kl_estimate.accumulate import Accumulator, Weights
from rlkl.evaluation.kl_estimate.draws import Draws, sampled
from rlkl.evaluation.kl_estimate.measure import Context, Measured, VocabularySums, measure
from rlkl.evaluation.kl_estimate.report import (
    KLReport,
    Likely,
    Sample,
    SampleToken,
    TokenShare,
    WideContext,
)
from rlkl.evaluation.kl_estimate.units import Estimand, Units
from rlkl.kl import ESTIMATORS
from rlkl.models import ModelPair

_KEPT_SAMPLES = 8
_TOP_TOKENS = 20
_TRUSTED_ESS = 0.1
_MIN_SAMPLES = 64
"""Before this many responses a standard error is too rough to stop by."""


@dataclass(frozen=True)
class Sampling:
    """How much is sampled, and how."""

    num_samples: int = 256
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    target_stderr: float | None = None
    """In nats per response: go on after `num_samples` until the headline's error is this small."""
    max_samples: int = 65_536
    """With `target_stderr`: stop here in any case."""
    headline: str = "rb"
    estimand: Estimand = Estimand.POPULATION

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size", "max_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be positive and finite")
        if self.target_stderr is not None and not 0 < self.target_stderr < float("inf"):
            raise ValueError(f"target_stderr={self.target_stderr}: must be positive and finite")
        if self.target_stderr is not None and self.max_samples < self.num_samples:
            raise ValueError(
                f"max_samples={self.max_samples} is less than num_samples={self.num_samples}"
            )
        if self.headline not in ESTIMATORS:
            raise ValueError(f"headline={self.headline!r}: use one of {', '.join(ESTIMATORS)}")

    @property
    def limit(self) -> int:
        """Responses that will be drawn at most."""
        return self.num_samples if self.target_stderr is None else self.max_samples


class KLEstimation:
    """An estimate in progress: one batch a step, a report at any time.

    What it keeps are sums per prompt and per token of the vocabulary, a few contexts and the first
    responses: its memory does not grow with the number of samples.
    """

    def __init__(
        self,
        pair: ModelPair,
        prompts: list[str],
        sampling: Sampling,
        names: tuple[str, str] = ("policy", "ref"),
    ) -> None:
        """Args: the models; prompts; how much to sample; what to call the models in the report.

        Raises:
            ValueError: prompts or settings that cannot be sampled.
        """
        self.pair, self.sampling, self.names = pair, sampling, names
        used = min(len(prompts), sampling.limit)
        self.accumulator = Accumulator(Units.of(used, sampling.estimand))
        self.vocabulary = VocabularySums()
        self.samples: list[Sample] = []
        self.num_prompts, self.seconds, self.sampling_seconds = len(prompts), 0.0, 0.0
        self._draws: Iterator[Draws] = sampled(
            pair,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            batch_size=sampling.batch_size,
            limit=sampling.limit,
        )
        self._finished = False

    @property
    def n(self) -> int:
        """Responses so far."""
        return self.accumulator.totals.n

    @property
    def done(self) -> bool:
        """There is enough, or no more."""
        if self._finished or self.n >= self.sampling.limit:
            return True
        target = self.sampling.target_stderr
        if target is None or self.n < max(self.sampling.num_samples, _MIN_SAMPLES):
            return False
        return float(self.accumulator.interval(self.sampling.headline).stderr) <= target

    def step(self) -> None:
        """Draws, measures and adds one batch."""
        begin = time.perf_counter()
        draws = next(self._draws)
        drawn = time.perf_counter()
        measured = measure(self.pair, draws.responses, self.sampling.temperature, self.vocabulary)
        self.accumulator.add(draws, measured, Weights.ones(measured.mask))
        self._keep_samples(draws, measured)
        self.sampling_seconds += drawn - begin
        self.seconds += time.perf_counter() - begin

    def _keep_samples(self, draws: Draws, measured: Measured) -> None:
        decode = self.pair.tokenizer.decode
        for row in range(min(_KEPT_SAMPLES - len(self.samples), len(draws.responses))):
            real = measured.mask[row]
            columns = (
                draws.responses.tokens[row].cpu()[real].tolist(),
                measured.k["rb"][row][real].tolist(),
                measured.policy_logp[row][real].exp().tolist(),
                measured.ref_logp[row][real].exp().tolist(),
            )
            tokens = [
                SampleToken(str(decode([token])), kl, policy, ref)
                for token, kl, policy, ref in zip(*columns, strict=True)
            ]
            prompt = draws.responses.prompts[row]
            self.samples.append(Sample(prompt, tokens, bool(draws.responses.ended[row])))

    def report(self, interrupted: bool = False) -> KLReport:
        """What is known so far.

        Raises:
            ValueError: there is no response yet.
        """
        if self.n == 0:
            raise ValueError("there is no response yet: nothing to report")
        totals, sampling = self.accumulator.totals, self.sampling
        return KLReport(
            policy=self.names[0],
            ref=self.names[1],
            estimators=self.accumulator.estimates(),
            headline=sampling.headline,
            n=totals.n,
            prompts=min(self.num_prompts, totals.n),
            tokens=totals.tokens,
            ess=self.accumulator.ess,
            ess_ref=self.accumulator.ess_ref,
            truncated_fraction=totals.truncated / totals.n,
            truncated_weights=totals.cut_weights / totals.tokens,
            seconds=self.seconds,
            sampling_seconds=self.sampling_seconds,
            estimand=self.accumulator.units.estimand,
            units=self.accumulator.used_units,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            interrupted=interrupted,
            profile=self.accumulator.profile(),
            top_tokens=self._top_tokens(),
            contexts=[self._context(context) for context in self.vocabulary.contexts],
            samples=self.samples,
            notes=(*self.pair.notes, *self._notes()),
        )

    def _top_tokens(self) -> list[TokenShare]:
        sums = self.vocabulary
        whole = float(sums.contribution.sum())
        if whole == 0:
            return []
        index = sums.contribution.topk(min(_TOP_TOKENS, len(sums.contribution))).indices
        return [
            TokenShare(
                token=self._token(v),
                share=float(sums.contribution[v]) / whole,
                policy=float(sums.policy[v]) / sums.tokens,
                ref=float(sums.ref[v]) / sums.tokens,
            )
            for v in index.tolist()
            if float(sums.contribution[v]) > 0
        ]

    def _context(self, context: Context) -> WideContext:
        policy_top, ref_top = (
            [Likely(self._token(v), p, q) for v, p, q in top]
            for top in (context.policy_top, context.ref_top)
        )
        return WideContext(context.text, context.kl, policy_top, ref_top)

    def _token(self, token_id: int) -> str:
        return str(self.pair.tokenizer.decode([token_id]))

    def _notes(self) -> list[str]:
        notes, totals, sampling = [], self.accumulator.totals, self.sampling
        if totals.truncated:
            notes.append(
                f"{totals.truncated / totals.n:.0%} of the responses were cut at "
                f"{sampling.max_new_tokens} tokens: the KL is that of the first "
                f"{sampling.max_new_tokens} tokens."
            )
        if self.accumulator.ess_ref < _TRUSTED_ESS * totals.n:
            notes.append(
                f"cv rests on the weights q(y)/π(y), whose effective sample size is "
                f"{self.accumulator.ess_ref:.0f} of {totals.n}: the few responses that would "
                "matter most are hardly ever drawn, and its error is larger than it says."
            )
        target = sampling.target_stderr
        if target is not None:
            reached = float(self.accumulator.interval(sampling.headline).stderr)
            if reached > target:
                notes.append(
                    f"The standard error is {reached:.2g}, not yet {target:g}, after {totals.n} "
                    "responses. Where more responses no longer help, the prompts themselves "
                    "differ by that much: use more prompts, or the mean over the given prompts."
                )
        return notes


def estimate_kl(
    policy: nn.Module,
    ref_model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    num_samples: int = 256,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    target_stderr: float | None = None,
    max_samples: int = 65_536,
    headline: str = "rb",
    estimand: Estimand | str = Estimand.POPULATION,
    on_batch: Callable[[KLEstimation], None] | None = None,
) -> KLReport:
    """D_KL(policy ‖ ref) of the response, by every estimator on the same sampled responses.

    Responses are sampled from the policy at `temperature`, which is part of both distributions;
    those cut at `max_new_tokens` are counted as the first steps of longer ones, and the KL is that
    of these steps. Standard errors are over independent units: see
    :mod:`rlkl.evaluation.kl_estimate.units`. Memory does not grow with the number of samples.

    Args:
        policy: the policy, in eval mode.
        ref_model: the reference; None means the policy with its PEFT adapter off.
        tokenizer: of both.
        prompts: texts; taken in a shuffled order, and again from the first when all are used.
        num_samples: responses, in all prompts together.
        max_new_tokens: length limit.
        temperature: sampling temperature.
        seed: of the shuffle and of the draws.
        batch_size: responses per pass.
        target_stderr: in nats per response: after `num_samples`, go on until the standard error of
            `headline` is no larger. Stopping on what was seen makes intervals a little too short.
        max_samples: with `target_stderr`, stop here in any case.
        headline: the estimator to quote.
        estimand: ``population`` of prompts, or the mean over the ``given_prompts``.
        on_batch: called after each batch with the estimation so far; to stop, raise from it or use
            `KLEstimation` step by step.

    Raises:
        ValueError: no or empty prompts, prompts too long, a setting out of its range.

    Example:
        report = estimate_kl(policy, ref, tokenizer, prompts, num_samples=512)
        report.best.nats_per_response, report.best.ci95, report.estimators["k1"].stderr
    """
    sampling = Sampling(
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        target_stderr=target_stderr,
        max_samples=max_samples,
        headline=headline,
        estimand=Estimand(estimand),
    )
    pair = ModelPair.of(policy, ref_model, tokenizer)
    training = [model.training for model in pair.modules()]
    for model in pair.modules():
        model.eval()
    estimation = KLEstimation(pair, prompts, sampling)
    while not estimation.done:
        estimation.step()
        if on_batch is not None:
            on_batch(estimation)
    for model, was_training in zip(pair.modules(), training, strict=True):
        model.train(was_training)
    return estimation.report()
