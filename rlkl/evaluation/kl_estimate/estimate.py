"""The KL between two language models, estimated: sample, measure, add up, until there is enough."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlkl.evaluation.eval_mode import eval_mode
from rlkl.evaluation.kl_estimate.accumulate import MAX_POSITIONS, Accumulator, Weights
from rlkl.evaluation.kl_estimate.draws import (
    Draws,
    ResponseSource,
    SampledResponses,
    check_positive,
)
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
"""Below this share of the responses an effective sample size is worth a warning."""
_TRUSTED_CONTROL = 0.01
"""Nats per response: a control variate whose mean is this near to the 0 it should be is left alone;
above, twice the 95% interval decides."""
MIN_TEMPERATURE = 1e-6
"""Logits divided by less can leave float32."""
_MIN_SAMPLES = 64
"""Before this many responses a standard error is too rough to stop by."""


@dataclass(frozen=True)
class Settings:
    """What is estimated, and when it is enough."""

    temperature: float = 1.0
    """Part of both distributions."""
    target_stderr: float | None = None
    """In nats per response: stop once the headline's standard error is this small."""
    min_samples: int = 256
    """Not before that many responses, unless `max_samples` are fewer."""
    max_samples: int = 65_536
    """With `target_stderr`: stop here in any case."""
    headline: str = "rb"
    """The token-level estimator to quote and to stop by."""
    estimand: Estimand = Estimand.POPULATION
    truncate_at: float | None = None
    """Largest importance weight of responses that another policy sampled; None: not cut."""

    @property
    def limit(self) -> int:
        """Most responses to sample."""
        return self.min_samples if self.target_stderr is None else self.max_samples

    def __post_init__(self) -> None:
        check_positive(num_samples=self.min_samples, max_samples=self.max_samples)
        if not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature}: must be finite and at least {MIN_TEMPERATURE:g}"
            )
        if self.target_stderr is not None and not 0 < self.target_stderr < float("inf"):
            raise ValueError(f"target_stderr={self.target_stderr}: must be positive and finite")
        if self.truncate_at is not None and not self.truncate_at >= 1:
            raise ValueError(f"truncate_at={self.truncate_at}: must be at least 1")
        if self.headline not in ESTIMATORS:
            raise ValueError(f"headline={self.headline!r}: use one of {', '.join(ESTIMATORS)}")


class KLEstimation:
    """An estimate in progress: one batch a step, a report at any time.

    What it keeps are sums per prompt and per token of the vocabulary, a few contexts and the first
    responses: its memory does not grow with the number of samples. While `adding` is True the sums
    are half-way to the next batch, and an interruption would leave them there.
    """

    def __init__(
        self,
        pair: ModelPair,
        source: ResponseSource,
        settings: Settings,
        names: tuple[str, str] = ("policy", "ref"),
    ) -> None:
        """Args: the models; their responses; settings; what to call the models in the report."""
        self.pair, self.source, self.settings, self.names = pair, source, settings, names
        units = Units.of(source.num_prompts, settings.estimand)
        self.accumulator = Accumulator(units, source.max_tokens)
        self.vocabulary = VocabularySums()
        self.samples: list[Sample] = []
        self.seconds = self.sampling_seconds = 0.0
        self.adding = False
        self._batches = source.batches()

    @property
    def n(self) -> int:
        """Responses so far."""
        return self.accumulator.totals.n

    @property
    def done(self) -> bool:
        """There is enough, or no more."""
        if self.n >= self.source.limit:
            return True
        target = self.settings.target_stderr
        if target is None or self.n < max(self.settings.min_samples, _MIN_SAMPLES):
            return False
        return float(self.accumulator.interval(self.settings.headline).stderr) <= target

    def step(self) -> None:
        """Draws, measures and adds one batch."""
        begin = time.perf_counter()
        draws = next(self._batches)
        drawn = time.perf_counter()
        measured = measure(self.pair, draws.responses, self.settings.temperature, self.vocabulary)
        weights = Weights.of(draws, measured, self.settings.truncate_at)
        self.adding = True
        self.accumulator.add(draws, measured, weights)
        self.adding = False
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
        accumulator, totals = self.accumulator, self.accumulator.totals
        return KLReport(
            policy=self.names[0],
            ref=self.names[1],
            estimators=accumulator.estimates(),
            headline=self.settings.headline,
            n=totals.n,
            prompts=totals.prompts,
            tokens=totals.tokens,
            ess=accumulator.ess,
            ess_ref=accumulator.ess_ref,
            truncated_fraction=totals.truncated / totals.n,
            truncated_weights=totals.cut_weights / totals.tokens,
            seconds=self.seconds,
            sampling_seconds=self.sampling_seconds,
            estimand=accumulator.units.estimand,
            units=accumulator.used_units,
            max_tokens=self.source.max_tokens,
            temperature=self.settings.temperature,
            interrupted=interrupted,
            profile=accumulator.profile(),
            top_tokens=self._top_tokens(),
            contexts=[self._context(context) for context in self.vocabulary.contexts],
            samples=self.samples,
            notes=(*self.pair.notes, *self.source.notes, *self._notes()),
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
        notes, accumulator, totals = [], self.accumulator, self.accumulator.totals
        if accumulator.ess_ref < _TRUSTED_ESS * totals.n:
            notes.append(
                "cv and cv_fitted rest on the weights q(y)/π(y), whose effective sample size is "
                f"{accumulator.ess_ref:.0f} of {totals.n}: the few responses that would matter "
                "most are hardly ever drawn, and their errors are larger than they say; the "
                "intervals are as wide as so few responses make them. k3 rests on the same "
                "weights, token by token."
            )
        if not totals.cut_weights:
            notes += self._control_notes()
        if accumulator.ess < _TRUSTED_ESS * totals.n:
            notes.append(
                "The policy is far from the sampler: the effective sample size is "
                f"{accumulator.ess:.0f} of {totals.n}, and errors are larger than they say. Sample "
                "from the policy itself."
            )
        if totals.cut_weights:
            notes.append(
                f"{totals.cut_weights / totals.tokens:.1%} of the importance weights were cut at "
                f"{self.settings.truncate_at:g}, which biases the KL downwards."
            )
        if self.source.max_tokens > MAX_POSITIONS:
            notes.append(
                f"mcv_positions is left out: it is for responses of at most {MAX_POSITIONS} tokens."
            )
        if accumulator.interval(self.settings.headline).half_width == math.inf:
            notes.append(
                "There is no interval: one response says nothing of how far others differ. Sample "
                "more, or with the estimand given_prompts at least two to each prompt."
            )
        target = self.settings.target_stderr
        if target is not None:
            reached = float(accumulator.interval(self.settings.headline).stderr)
            if reached > target:
                notes.append(
                    f"The standard error is {reached:.2g}, not yet {target:g}, after {totals.n} "
                    "responses. Where more responses no longer help, the prompts themselves "
                    "differ by that much: use more prompts, or estimand given_prompts."
                )
        return notes

    def _control_notes(self) -> list[str]:
        """Says where the reference's mass was not drawn: equal weights near 0 have a large ess."""
        notes = []
        for name, weights in (
            ("cv", "cv and cv_fitted rest on the weights q(y)/π(y)"),
            ("k3", "k3 rests on the weights q(y_t|h_t)/π(y_t|h_t) of the tokens"),
        ):
            control = self.accumulator.control(name)
            mean, half = float(control.mean), float(control.half_width)
            if not abs(mean) <= max(_TRUSTED_CONTROL, 2 * half):
                notes.append(
                    f"{weights}, which should be 1 in the mean. Summed over a response they miss "
                    f"that by {mean:.3g} ± {half:.2g}, and the estimate is off by about as many "
                    "nats, whatever its interval says: what the reference would rather say is "
                    "hardly ever drawn."
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
    max_prompt_length: int | None = None,
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
        policy: the policy, in eval mode while this runs; so is the reference.
        ref_model: the reference; None means the policy with its PEFT adapter off.
        tokenizer: of both.
        prompts: texts; taken in a shuffled order, and again from the first when all are used.
        num_samples: responses, in all prompts together.
        max_new_tokens: length limit.
        temperature: sampling temperature.
        max_prompt_length: longest prompt in tokens; longer ones lose their beginning.
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
    pair = ModelPair.of(policy, ref_model, tokenizer)
    settings = Settings(
        temperature=temperature,
        target_stderr=target_stderr,
        min_samples=num_samples,
        max_samples=max_samples,
        headline=headline,
        estimand=Estimand(estimand),
    )
    source = SampledResponses(
        pair,
        prompts,
        limit=settings.limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
    )
    estimation = KLEstimation(pair, source, settings)
    with eval_mode(*pair.modules()):
        while not estimation.done:
            estimation.step()
            if on_batch is not None:
                on_batch(estimation)
    return estimation.report()
