"""What a KL term really estimates and optimises: value and gradient of each, exact by enumeration.

On a tabular language model every response can be listed. So for each estimator, each place where it
enters the update, and for responses of the policy ("on") or of an older one ("off"), the audit has,
without sampling: bias and variance of the value, the error and the direction of the expected
gradient against ∇D_KL(policy ‖ ref) of the sequence, and the variance of the gradient.
`rlkl.evaluation.audit_terms` has the terms.
"""

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

MAX_RESPONSES = 2000
TOLERANCE = 1e-9
"""Relative errors below it are rounding."""


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
        ValueError: more responses than the audit lists.
    """
    if vocab_size < 2 or length < 1:
        raise ValueError(
            f"vocab is {vocab_size} and length {length}; use at least 2 tokens and length 1"
        )
    going_on = vocab_size - (eos is not None)
    count = sum(going_on**t for t in range(length)) * (eos is not None) + going_on**length
    if count > MAX_RESPONSES:
        raise ValueError(
            f"vocab {vocab_size} and length {length} make {count} responses, all of which would be "
            f"listed; use at most {MAX_RESPONSES}: a smaller vocab or length"
        )
    policy, ref, noise = (
        TabularLM.random(vocab_size, length, eos=eos, seed=3 * seed + i) for i in range(3)
    )
    return Models(policy, ref, policy.with_logits(policy.logits + drift * noise.logits))


def models_from_json(record: dict[str, Any]) -> Models:
    """Models from ``{"length": T, "eos": 0 or null, "policy": logits, "ref": logits}``.

    Logits are one row per prefix, `vocab` numbers each, in the order of `TabularLM.prefixes`;
    "sampler" is optional and is the policy where it is missing.

    Raises:
        ValueError: a key is missing or unknown, or the logits are not the rows of such a model.
    """
    known, needed = {"length", "eos", "policy", "ref", "sampler"}, {"length", "policy", "ref"}
    if not isinstance(record, dict) or not needed <= record.keys() <= known:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"a model file has the keys length, policy, ref and, if wanted, eos and sampler; this "
            f"has {keys}"
        )

    def model(name: str) -> TabularLM:
        try:
            logits = torch.tensor(record[name], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is not a table of numbers: {error}") from error
        if logits.ndim != 2:
            raise ValueError(f"{name} has {logits.ndim} dimensions; use one row of logits a prefix")
        return TabularLM(logits, record["length"], record.get("eos"))

    policy, ref = model("policy"), model("ref")
    return Models(policy, ref, model("sampler") if "sampler" in record else policy)


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
        ValueError: the models have different responses, or `top_k` or `truncate_at` is below 1.
    """
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
        "ess_fraction": 1 / (1 + weights),
        "truncated_fraction": over,
        "rows": [
            row
            for which, sampling, terms in (
                (on, "on", plain_terms(top_k) + response_terms()),
                (off, "off", plain_terms(top_k) + weighted_terms(truncate_at)),
            )
            for row in _rows(terms, which, sampling, exact, gradient)
        ],
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
    logps = [lm.policy_logp().gather(-1, index).squeeze(-1) for lm in (policy, sampler)]
    weights = response_weights(*logps, policy.mask)
    over = (prefix_weights(*logps, policy.mask) > truncate_at) & policy.mask
    lengths = response_moments(sampler, policy.mask.double().sum(1)).mean
    share = response_moments(sampler, over.double().sum(1)).mean / lengths
    return response_moments(sampler, weights).variance.item(), share.item()
