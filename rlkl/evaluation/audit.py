"""What a KL term really estimates and optimises: value and gradient of each, exact by enumeration.

On a tabular language model every response can be listed. So for each estimator, each place where it
enters the update, and for responses of the policy ("on") or of an older one ("off"), the audit has,
without sampling: bias and variance of the value, the error and the direction of the expected
gradient against ∇D_KL(policy ‖ ref) of the sequence, and the variance of the gradient.
`rlkl.evaluation.audit_terms` has the terms.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlkl.evaluation.audit_terms import (
    Batch,
    Term,
    configurations,
    plain_terms,
    response_terms,
    weighted_terms,
)
from rlkl.kl import (
    TabularLM,
    exact_gradient,
    exact_kl,
    prefix_weights,
    response_moments,
    response_weights,
    surrogate_moments,
)

MAX_DERIVATIVES = 5_000_000
"""N·N·T·V at most: each of a term's N values by the log-probabilities [N, T, V]. Time and memory
grow with it."""
MIN_PROBABILITY = 1e-150
"""Of any response: the audit squares ratios of probabilities, and float64 ends at 1e308."""
TOLERANCE = 1e-9
"""Relative errors below it are rounding."""
HT_DRAWS = 8
"""Responses in one Horvitz-Thompson estimate."""


@dataclass(frozen=True)
class Models:
    """The three models of an audit, over the same responses."""

    policy: TabularLM
    ref: TabularLM
    sampler: TabularLM
    """Samples the responses of the rows with sampling "off"; an older policy, say."""


def random_models(
    vocab_size: int, length: int, *, seed: int = 0, eos: int | None = 0, drift: float = 1.0
) -> Models:
    """Policy and reference with normal logits, and a sampler whose logits differ by `drift`.

    Raises:
        ValueError: more than the audit can differentiate, or a `drift` whose logits are not finite.
    """
    _check_size(vocab_size, length, eos)
    policy, ref, noise = (
        TabularLM.random(vocab_size, length, eos=eos, seed=(3 * seed + i) % 2**64) for i in range(3)
    )
    sampler_logits = policy.logits + drift * noise.logits
    if not sampler_logits.isfinite().all():
        raise ValueError(f"drift is {drift}; the sampler's logits must be finite: use 1, say")
    return Models(policy, ref, policy.with_logits(sampler_logits))


def _check_probabilities(models: Models) -> None:
    """Refuses models whose weights, or the squares of them, are lost to under- or overflow."""
    for name in ("policy", "ref", "sampler"):
        lowest = getattr(models, name).response_logp().min().item()
        if not lowest >= math.log(MIN_PROBABILITY):
            raise ValueError(
                f"{name} gives a response the probability 10^{lowest / math.log(10):.4g}; below "
                f"{MIN_PROBABILITY:g} variances of weights are no numbers in float64: use "
                + ("a smaller drift, or " if name == "sampler" else "")
                + "logits that are closer to one another"
            )


def _check_size(vocab_size: int, length: int, eos: int | None) -> None:
    """Refuses models that are too large before anything of them is listed."""
    if vocab_size < 2 or length < 1:
        raise ValueError(
            f"vocab is {vocab_size} and length {length}; use at least 2 tokens and length 1"
        )
    ended, going_on = 0, 1
    for _ in range(length):
        ended += going_on if eos is not None else 0
        going_on *= vocab_size - (eos is not None)
        responses = ended + going_on
        if responses**2 * length * vocab_size > MAX_DERIVATIVES:
            raise ValueError(
                f"vocab {vocab_size} and length {length} make at least {responses} responses, all "
                "of which would be listed and differentiated, N·N·T·V derivatives of at most "
                f"{MAX_DERIVATIVES:,}: use a smaller vocab or length"
            )


def models_from_json(record: dict[str, Any]) -> Models:
    """Models from ``{"length": T, "eos": 0 or null, "policy": logits, "ref": logits}``.

    Logits are one row per prefix, `vocab` numbers each, in the order of `TabularLM.prefixes`;
    "sampler" is optional and is the policy where it is missing.

    Raises:
        ValueError: a key is missing or unknown, the logits are not the finite rows of such a model,
            or it is larger than the audit can differentiate.
    """
    known, needed = {"length", "eos", "policy", "ref", "sampler"}, {"length", "policy", "ref"}
    if not isinstance(record, dict) or not needed <= record.keys() <= known:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"a model file has the keys length, policy, ref and, if wanted, eos and sampler; this "
            f"has {keys}"
        )

    length, eos = record["length"], record.get("eos")
    if type(length) is not int:
        raise ValueError(f"length is {length!r}; it must be an integer")
    if eos is not None and type(eos) is not int:
        raise ValueError(f"eos is {eos!r}; it must be a token's number, or null")

    def model(name: str) -> TabularLM:
        try:
            logits = torch.tensor(record[name], dtype=torch.float64)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{name} is not a table of numbers: {error}") from error
        if logits.ndim != 2:
            raise ValueError(f"{name} has {logits.ndim} dimensions; use one row of logits a prefix")
        if not logits.isfinite().all():
            raise ValueError(
                f"{name} has logits that are not finite: gradients need every token to be "
                "possible; use a low one, such as -30, where one hardly is"
            )
        _check_size(logits.shape[1], length, eos)
        return TabularLM(logits, length, eos)

    policy, ref = model("policy"), model("ref")
    models = Models(policy, ref, model("sampler") if "sampler" in record else policy)
    for name, lm in (("ref", ref), ("sampler", models.sampler)):
        if lm.logits.shape != policy.logits.shape:
            raise ValueError(
                f"{name} has logits of {lm.logits.shape[1]} tokens and policy of "
                f"{policy.logits.shape[1]}; all models need the same vocabulary"
            )
    return models


def audit(models: Models, *, top_k: int = 2, truncate_at: float = 1.5) -> dict[str, Any]:
    """The whole audit as a record: ``exact_kl``, ``rows``, ``configurations``, and what they mean.

    Each row has `estimator`, `placement`, `sampling` ("on": the policy sampled, "off": the
    sampler), `value_bias` (E[value] − exact, nats per response), `value_var` (of one response),
    `grad_rel_err` (‖E[g] − ∇D_KL‖ / ‖∇D_KL‖), `grad_cos` (cosine of the two) and `grad_var` (trace
    of the covariance of one response's gradient); None where a row has no value or no gradient, or
    the true gradient is 0. Configurations have `name`, `note` and `source` besides.

    Args:
        models: policy, reference and sampler.
        top_k: the head of topk and topk_bucket.
        truncate_at: the bound of truncated weights.

    Raises:
        ValueError: the models have different responses, one of them gives a response less than
            `MIN_PROBABILITY`, or `top_k` or `truncate_at` is below 1.
    """
    if not truncate_at >= 1:
        raise ValueError(f"truncate_at is {truncate_at}; it must be at least 1")
    _check_probabilities(models)
    exact, gradient = exact_kl(models.policy, models.ref), exact_gradient(models.policy, models.ref)
    on, off = replace(models, sampler=models.policy), models

    weights, over = _weights(off, truncate_at)
    return {
        "exact_kl": exact.item(),
        "vocab": models.policy.logits.shape[1],
        "length": models.policy.length,
        "responses": len(models.policy.tokens),
        "top_k": top_k,
        "truncate_at": truncate_at,
        "other_sampler": not torch.equal(models.sampler.logits, models.policy.logits),
        "ess_fraction": 1 / (1 + weights),
        "truncated_fraction": over,
        "rows": [
            row
            for which, sampling, terms in (
                (on, "on", plain_terms(top_k) + response_terms()),
                (
                    off,
                    "off",
                    plain_terms(top_k)
                    + weighted_terms(truncate_at)
                    + response_terms("value only, weighted"),
                ),
            )
            for row in _rows(terms, which, sampling, exact, gradient)
        ]
        + [_horvitz_thompson(models, HT_DRAWS)],
        "configurations": [
            {"name": name, **row, "note": term.note, "source": term.source}
            for which, sampling in ((on, "on"), (off, "off"))
            for name, term in configurations(truncate_at).items()
            for row in _rows([term], which, sampling, exact, gradient)
        ],
    }


def measure(term: Term, models: Models, exact: Tensor, gradient: Tensor) -> dict[str, float | None]:
    """Bias and variance of a term's value; error, cosine and variance of its gradient."""
    ref_logp, sampler_logp = models.ref.policy_logp(), models.sampler.policy_logp()
    prob = models.sampler.response_logp().exp()

    def batch(policy_logp: Tensor) -> Batch:
        tokens, mask = models.policy.tokens, models.policy.mask
        return Batch(policy_logp, ref_logp, sampler_logp, tokens, mask, prob)

    values = response_moments(models.sampler, term.value(batch(models.policy.policy_logp())))
    result: dict[str, float | None] = {
        "value_bias": (values.mean - exact).item(),
        "value_var": values.variance.item(),
        "grad_rel_err": None,
        "grad_cos": None,
        "grad_var": None,
    }
    if term.surrogate is None:
        return result
    surrogate = term.surrogate
    mean, variance = surrogate_moments(
        models.policy, lambda policy_logp: surrogate(batch(policy_logp)), models.sampler
    )
    result["grad_var"] = variance.item()
    size, length = gradient.norm(), mean.norm()
    if size <= TOLERANCE:  # the true gradient is 0: there is no direction to miss
        return result
    result["grad_rel_err"] = ((mean - gradient).norm() / size).item()
    if length > TOLERANCE * size:
        result["grad_cos"] = ((mean * gradient).sum() / (size * length)).item()
    return result


def _horvitz_thompson(models: Models, draws: int) -> dict[str, Any]:
    """The row of ht: draws times the variance of the estimate from as many responses.

    With p_y drawn = 1 - (1 - π(y))^m the probability that y is among them, the variance is that of
    a sum over y of 1[y drawn] π(y) U(y) / p_y, whose indicators are not independent.
    """
    prob = models.policy.response_logp().exp()
    possible = prob > 0
    prob, absent = prob[possible], (1 - prob[possible]) ** draws
    log_ratio = (models.policy.response_logp() - models.ref.response_logp())[possible]
    drawn = 1 - absent
    neither = (1 - prob[:, None] - prob).clamp(min=0) ** draws
    both = 1 - absent[:, None] - absent + neither
    both = torch.where(torch.eye(len(prob), dtype=torch.bool), drawn, both)
    term = prob * log_ratio / drawn
    variance = term @ (both - drawn[:, None] * drawn) @ term
    none = dict.fromkeys(("grad_rel_err", "grad_cos", "grad_var"))
    return {
        "estimator": f"ht, {draws} draws",
        "placement": "value only",
        "sampling": "on",
        "value_bias": (drawn @ term - exact_kl(models.policy, models.ref)).item(),
        "value_var": (draws * variance).item(),
        **none,
    }


def _rows(
    terms: list[Term], models: Models, sampling: str, exact: Tensor, gradient: Tensor
) -> list[dict[str, Any]]:
    return [
        {
            "estimator": term.estimator,
            "placement": term.placement,
            "sampling": sampling,
            **measure(term, models, exact, gradient),
        }
        for term in terms
    ]


def _weights(models: Models, truncate_at: float) -> tuple[float, float]:
    """Variance of π(y)/μ(y) under μ, and the expected share of tokens with W_t > c."""
    policy, sampler = models.policy, models.sampler
    index = policy.tokens.unsqueeze(-1)
    logp, sampled = (lm.policy_logp().gather(-1, index).squeeze(-1) for lm in (policy, sampler))
    weights = response_weights(logp, sampled, policy.mask)
    over = (prefix_weights(logp, sampled, policy.mask) > truncate_at) & policy.mask
    lengths = response_moments(sampler, policy.mask.double().sum(1)).mean
    share = response_moments(sampler, over.double().sum(1)).mean / lengths
    return response_moments(sampler, weights).variance.item(), share.item()
