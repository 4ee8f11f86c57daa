"""The KL terms that `rlkl audit` measures: rlkl's own, and those of the field's libraries.

Every term is a value and a surrogate per response, as functions of the distributions of policy,
reference and sampler. A library's configuration is its KL term alone, as its source has it at the
version named: without reward, advantage normalisation, PPO clipping, critic and leave-one-out
baseline, with γ = λ = 1, and summed over a response's tokens. β = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlkl.kl import (
    ESTIMATORS,
    RESPONSE_ESTIMATORS,
    ControlVariateEstimator,
    Estimator,
    KLPlacement,
    TopKBucketEstimator,
    TopKEstimator,
    future_kl,
    get_estimator,
    kl_surrogate,
    prefix_weighted_surrogate,
    response_statistics,
    response_weights,
    token_ratio_surrogate,
    token_ratios,
)
from rlkl.kl.control_moments import fit_coefficients


@dataclass(frozen=True)
class Batch:
    """Every response, with what a trainer would hold of it; `policy_logp` carries the gradient."""

    policy_logp: Tensor
    """[N, T, V]"""
    ref_logp: Tensor
    """[N, T, V]"""
    sampler_logp: Tensor
    """[N, T, V]"""
    tokens: Tensor
    mask: Tensor
    prob: Tensor
    """[N] probability of each response under the sampler."""

    def token(self, logp: Tensor) -> Tensor:
        """Log-probabilities of the sampled tokens, 0 where masked: [N, T]."""
        sampled = logp.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.mask, sampled, 0.0)

    @property
    def weighting(self) -> tuple[Tensor, Tensor, Tensor]:
        """Policy's and sampler's token log-probs, and the mask: the arguments of the weights."""
        return self.token(self.policy_logp), self.token(self.sampler_logp), self.mask


@dataclass(frozen=True)
class Term:
    """A KL term: the value it reports and a surrogate with its gradient, for each response."""

    estimator: str
    placement: str
    value: Callable[[Batch], Tensor]
    """[N] nats per response."""
    surrogate: Callable[[Batch], Tensor] | None
    """[N]; None: it measures and is not differentiated."""
    note: str = ""
    source: str = ""


def plain_terms(top_k: int) -> list[Term]:
    """Every estimator in every placement, as if the policy had sampled."""
    terms = []
    for estimator in _estimators(top_k):

        def value(batch: Batch, estimator: Estimator = estimator) -> Tensor:
            return _k(estimator, batch).sum(1)

        for placement in KLPlacement:

            def surrogate(
                batch: Batch,
                estimator: Estimator = estimator,
                placement: KLPlacement = placement,
            ) -> Tensor:
                own = estimator.claims.own_token
                logp = batch.token(batch.policy_logp)
                return kl_surrogate(
                    _k(estimator, batch), logp, batch.mask, placement, own_token=own
                )

            terms.append(Term(estimator.name, str(placement), value, surrogate))
    return terms


def weighted_terms(truncate_at: float) -> list[Term]:
    """What off-policy responses can be weighted by: prefix weights, whole or truncated; ratios."""
    terms = []
    for name in ("k1", "k3", "rb"):
        estimator = get_estimator(name)
        for bound in (None, truncate_at):

            def weighted(
                batch: Batch, estimator: Estimator = estimator, bound: float | None = bound
            ) -> Tensor:
                return prefix_weighted_surrogate(
                    _k(estimator, batch),
                    *batch.weighting,
                    own_token=estimator.claims.own_token,
                    truncate_at=bound,
                )

            how = "prefix" if bound is None else f"prefix ≤ {bound:g}"
            terms.append(Term(name, f"both, {how}", weighted, weighted))

        def by_token(batch: Batch, estimator: Estimator = estimator) -> Tensor:
            return token_ratio_surrogate(_k(estimator, batch), *batch.weighting)

        terms.append(Term(name, "loss, token ratio", by_token, by_token))
    return terms


def response_terms(placement: str = "value only") -> list[Term]:
    """Response-level estimators with their best coefficients: what fitted ones tend to.

    They measure whole responses, and no trainer differentiates them. Those of another sampler are
    weighted (`response_statistics`); ht has to know with which probability each was drawn.
    """
    terms = []
    for name, estimator in RESPONSE_ESTIMATORS.items():
        if isinstance(estimator, ControlVariateEstimator):

            def value(batch: Batch, estimator: ControlVariateEstimator = estimator) -> Tensor:
                policy, sampler, mask = batch.weighting
                anchor, controls = estimator.terms(
                    response_statistics(
                        policy,
                        batch.token(batch.ref_logp),
                        _k(get_estimator("rb"), batch),
                        mask,
                        sampler_token_logp=sampler,
                    )
                )
                z = torch.cat([torch.ones_like(controls[:, :1]), anchor[:, None], controls], 1)
                best = fit_coefficients(z.T @ (batch.prob[:, None] * z))
                if estimator.coefficient is not None:
                    best = torch.full_like(best, estimator.coefficient)
                return anchor + controls @ best

            terms.append(Term(name, placement, value, None))
    return terms


def configurations(truncate_at: float) -> dict[str, Term]:
    """KL terms of the field's libraries, by the name a user would look for."""
    trl = "trl 1.16, trl/trainer/"
    verl = "verl, verl/trainer/ppo/core_algos.py, kl_penalty"
    openrlhf = "OpenRLHF, openrlhf/models/utils.py, compute_approx_kl and compute_reward"
    published = "github.com/rycolab/kl-rb, trl/trainer/rloo_trainer.py"
    old_k1 = _in_reward("k1")
    tokens_only = "token-level gradient: what a token does to the KL of later prefixes is left out"
    return {
        "TRL RLOO": Term(
            "k1",
            "reward, whole sequence",
            _old_value("k1"),
            lambda b: response_weights(*b.weighting) * _old_value("k1")(b),
            "exact on its own samples, with the KL of all tokens as the weight of each",
            trl + "rloo_trainer.py",
        ),
        "TRL GRPO (default)": Term(
            "k3",
            "loss, token ratio",
            _ratio_loss("k3"),
            _ratio_loss("k3"),
            tokens_only,
            trl + "grpo_trainer.py, use_bias_correction_kl=True",
        ),
        "TRL GRPO, use_bias_correction_kl=False": Term(
            "k3",
            "loss",
            _value("k3"),
            _value("k3"),
            "gradient of the forward token KL, D_KL(ref ‖ policy)",
            trl + "grpo_trainer.py",
        ),
        "TRL PPO (up to 1.12)": Term(
            "k1",
            "reward",
            _old_value("k1"),
            old_k1,
            "exact on its own samples",
            "trl 1.12, trl/experimental/ppo/ppo_trainer.py, kl_estimator=k1",
        ),
        "TRL PPO (up to 1.12), kl_estimator=k3": Term(
            "k3",
            "reward",
            _old_value("k3"),
            _in_reward("k3"),
            "∇D_KL less the gradient of the forward token KL",
            "trl 1.12, trl/experimental/ppo/ppo_trainer.py",
        ),
        "verl, KL in reward (kl, k1)": Term(
            "k1", "reward", _old_value("k1"), old_k1, "exact on its own samples", verl
        ),
        "verl, KL loss low_var_kl (k3)": Term(
            "k3, clamped",
            "loss",
            _verl_k3,
            _verl_k3,
            "gradient of the forward token KL; log-ratio clamped to ±20, k3 to 10",
            verl,
        ),
        "verl, KL loss k3+": Term(
            "k3, gradient of k2",
            "loss",
            _verl_k3,
            _value("k2"),
            tokens_only,
            verl,
        ),
        "OpenRLHF, KL in reward (k1)": Term(
            "k1", "reward", _old_value("k1"), old_k1, "exact on its own samples", openrlhf
        ),
        "OpenRLHF, KL loss k2": Term(
            "k2", "loss", _value("k2"), _value("k2"), tokens_only, openrlhf
        ),
        "OpenRLHF, KL loss k3": Term(
            "k3",
            "loss",
            _value("k3"),
            _value("k3"),
            "gradient of the forward token KL, D_KL(ref ‖ policy)",
            openrlhf,
        ),
        "KL-RB code, stepwise": Term(
            "rb",
            "both, whole sequence",
            _value("rb"),
            lambda b: response_weights(*b.weighting) * _value("rb")(b),
            "exact gradient, the KL of all prefixes, those before the token too, as its weight",
            published,
        ),
        "KL-RB code, Monte Carlo": Term(
            "k1",
            "both, whole sequence",
            _value("k1"),
            lambda b: response_weights(*b.weighting) * _value("k1")(b),
            "exact gradient; differentiating k1 as well adds noise of mean zero",
            published,
        ),
        "rlkl RaoBlackwellPPOTrainer": Term(
            "rb",
            "both",
            _value("rb"),
            lambda b: _in_reward("rb")(b) + _value("rb")(b),
            "exact on its own samples; shifted: only the KL of later prefixes weighs a token",
            "rlkl.trainers, kl_off_policy=none",
        ),
        "rlkl RaoBlackwellPPOTrainer, prefix": Term(
            "rb",
            "both, prefix",
            _prefix(None),
            _prefix(None),
            "exact, also for responses of an older policy",
            "rlkl.trainers, kl_off_policy=prefix",
        ),
        f"rlkl RaoBlackwellPPOTrainer, prefix_truncated at {truncate_at:g}": Term(
            "rb",
            f"both, prefix ≤ {truncate_at:g}",
            _prefix(truncate_at),
            _prefix(truncate_at),
            "exact on its own samples; on others biased by what the bound cuts off, less variance",
            "rlkl.trainers, kl_off_policy=prefix_truncated",
        ),
    }


def _estimators(top_k: int) -> list[Estimator]:
    """The registry, with a head that leaves a tail in a small vocabulary."""
    return [
        replace(e, k=top_k) if isinstance(e, TopKEstimator | TopKBucketEstimator) else e
        for e in ESTIMATORS.values()
    ]


def _k(estimator: Estimator, batch: Batch) -> Tensor:
    return estimator(batch.policy_logp, batch.ref_logp, batch.tokens, batch.mask)


def _value(name: str) -> Callable[[Batch], Tensor]:
    """Σ_t k_t of the policy as it is now."""
    return lambda batch: _k(get_estimator(name), batch).sum(1)


def _old(name: str, batch: Batch) -> Tensor:
    """k_t of the policy that sampled, a constant: what rewards are made of. [N, T]."""
    old = replace(batch, policy_logp=batch.sampler_logp)
    return _k(get_estimator(name), old).detach()


def _old_value(name: str) -> Callable[[Batch], Tensor]:
    return lambda batch: _old(name, batch).sum(1)


def _in_reward(name: str) -> Callable[[Batch], Tensor]:
    """PPO's policy gradient with k_t as the cost: Σ_t r_t sg(Σ_{s≥t} k_s), s > t for rb."""

    def surrogate(batch: Batch) -> Tensor:
        own = get_estimator(name).claims.own_token
        future = future_kl(_old(name, batch), batch.mask, own)
        return (token_ratios(*batch.weighting) * future).sum(1)

    return surrogate


def _ratio_loss(name: str) -> Callable[[Batch], Tensor]:
    return lambda batch: token_ratio_surrogate(_k(get_estimator(name), batch), *batch.weighting)


def _prefix(truncate_at: float | None) -> Callable[[Batch], Tensor]:
    return lambda batch: prefix_weighted_surrogate(
        _k(get_estimator("rb"), batch), *batch.weighting, own_token=False, truncate_at=truncate_at
    )


def _verl_k3(batch: Batch) -> Tensor:
    """Σ_t of k3 with verl's clamps."""
    back = (batch.token(batch.ref_logp) - batch.token(batch.policy_logp)).clamp(-20, 20)
    return torch.where(batch.mask, (back.exp() - back - 1).clamp(-10, 10), 0.0).sum(1)
