"""A language model small enough to enumerate: the truth that estimators are checked against.

`TabularLM` has one row of logits per prefix and lists every response it can give. Sums over that
list are exact expectations, so the value, the gradient and the variance of any estimate are known
to the last digit, not sampled. One empty prompt; temperature 1; float64 throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.estimators import Estimator
from rlkl.kl.placement import KLPlacement, kl_surrogate
from rlkl.kl.sequence import sequence_kl


class TabularLM:
    """An autoregressive model over V tokens and at most `length` steps, one logit row per prefix.

    A response ends with `eos` (its last token), or is cut after `length` tokens. There are N of
    them, over P prefixes: all sequences of fewer than `length` tokens without `eos`, shorter first,
    then in lexicographic order; `prefixes` lists them in the order of the rows of `logits`.

    Attributes:
        logits: `[P, V]` float64, the parameters θ.
        tokens: `[N, T]`, every response, padded with 0.
        mask: `[N, T]`, True = response token, `eos` included.

    Raises:
        ValueError: `logits` has not one row per prefix, or `eos` is outside of the vocabulary.

    Example:
        >>> lm = TabularLM(torch.zeros(2, 2), length=2, eos=1)
        >>> lm.prefixes
        ((), (0,))
        >>> lm.tokens[lm.mask.sum(1) == 1], lm.response_logp().exp().tolist()
        (tensor([[1, 0]]), [0.5, 0.25, 0.25])
    """

    def __init__(self, logits: Float[Tensor, "P V"], length: int, eos: int | None = 0):
        """Takes the parameters.

        Args:
            logits: one row per prefix; -inf gives a token probability 0.
            length: the longest response, in tokens.
            eos: the token that ends a response; None, if all have `length` tokens.
        """
        responses = _enumerate(logits.shape[1], length, eos)
        if len(logits) != len(responses.prefixes):
            raise ValueError(
                f"logits has {len(logits)} rows; {logits.shape[1]} tokens, length {length} and eos "
                f"{eos} make {len(responses.prefixes)} prefixes, one row each"
            )
        self.logits = logits.double()
        self.length = length
        self.eos = eos
        self.prefixes = responses.prefixes
        self.tokens = responses.tokens
        self.mask = responses.mask
        self._prefix_rows = responses.prefix_rows

    @classmethod
    def random(
        cls, vocab_size: int, length: int, *, eos: int | None = 0, seed: int = 0, scale: float = 1.0
    ) -> "TabularLM":
        """A model with independent normal logits of standard deviation `scale`."""
        prefixes = len(_enumerate(vocab_size, length, eos).prefixes)
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(prefixes, vocab_size, generator=generator, dtype=torch.float64)
        return cls(scale * normal, length, eos)

    def with_logits(self, logits: Float[Tensor, "P V"]) -> "TabularLM":
        """The model of the same responses with other parameters, e.g. a copy that needs grad."""
        return TabularLM(logits, self.length, self.eos)

    def policy_logp(self) -> Float[Tensor, "N T V"]:
        """Log-probabilities π(·|h_t) at each position of each response; arbitrary where masked."""
        return torch.log_softmax(self.logits, -1)[self._prefix_rows]

    def response_logp(self) -> Float[Tensor, " N"]:
        """Log-probability of each response; the probabilities sum to 1."""
        return sequence_kl(_token_logp(self.policy_logp(), self.tokens), self.mask)


class Moments(NamedTuple):
    """Mean and variance over one sampled response; of a vector, the trace of its covariance."""

    mean: Float[Tensor, "*shape"]
    variance: Float[Tensor, ""]


def exact_kl(policy: TabularLM, ref: TabularLM) -> Float[Tensor, ""]:
    """D_KL(policy ‖ ref) = Σ_y π(y) [log π(y) - log q(y)] over all responses, in nats per response.

    Differentiable in the logits of both.

    Raises:
        ValueError: the two models have different responses.

    Example:
        >>> policy = TabularLM(torch.tensor([[0.5, 0.5]]).log(), length=1)
        >>> ref = TabularLM(torch.tensor([[0.25, 0.75]]).log(), length=1)
        >>> print(f"{exact_kl(policy, ref):.4f}")
        0.1438
    """
    _check_same_responses(policy, ref)
    logp = policy.response_logp()
    possible = logp > -torch.inf  # 0 · log 0 = 0, in the gradient too
    log_ratio = (logp - ref.response_logp())[possible]
    return (logp[possible].exp() * log_ratio).sum()


def exact_gradient(policy: TabularLM, ref: TabularLM) -> Float[Tensor, "P V"]:
    """∇D_KL(policy ‖ ref) of the sequence in the policy's logits, by autograd through `exact_kl`.

    Raises:
        ValueError: the two models have different responses.

    Example:
        >>> lm = TabularLM.random(3, 2)
        >>> exact_gradient(lm, lm).norm().item() < 1e-12
        True
    """
    logits = policy.logits.detach().requires_grad_()
    return torch.autograd.grad(exact_kl(policy.with_logits(logits), ref), logits)[0]


def value_moments(policy: TabularLM, ref: TabularLM, estimator: Estimator) -> Moments:
    """Mean and variance of the estimate Σ_t k_t from one response, nats and nats².

    Raises:
        ValueError: the two models have different responses.

    Example:
        >>> policy, ref = TabularLM.random(3, 2, seed=0), TabularLM.random(3, 2, seed=1)
        >>> from rlkl.kl.estimators import get_estimator
        >>> mean, variance = value_moments(policy, ref, get_estimator("rb"))
        >>> torch.isclose(mean, exact_kl(policy, ref)).item()
        True
    """
    _check_same_responses(policy, ref)
    k = estimator(policy.policy_logp(), ref.policy_logp(), policy.tokens, policy.mask)
    return response_moments(policy, sequence_kl(k, policy.mask))


def gradient_moments(
    policy: TabularLM, ref: TabularLM, estimator: Estimator, placement: KLPlacement | str
) -> Moments:
    """Mean `[P, V]` and variance (trace) of the gradient of `kl_surrogate` from one response.

    Raises:
        ValueError: the two models have different responses.

    Example:
        >>> policy, ref = TabularLM.random(3, 2, seed=0), TabularLM.random(3, 2, seed=1)
        >>> from rlkl.kl.estimators import get_estimator
        >>> mean, variance = gradient_moments(policy, ref, get_estimator("rb"), "both")
        >>> torch.allclose(mean, exact_gradient(policy, ref))
        True
    """
    _check_same_responses(policy, ref)
    ref_logp, tokens = ref.policy_logp(), policy.tokens
    # Responses that are never sampled: 0 times their infinite KL would be nan.
    mask = policy.mask & (policy.response_logp() > -torch.inf).unsqueeze(1)

    def surrogate(policy_logp: Tensor) -> Tensor:
        k = estimator(policy_logp, ref_logp, tokens, mask)
        token_logp = _token_logp(policy_logp, tokens)
        return kl_surrogate(k, token_logp, mask, placement, own_token=estimator.claims.own_token)

    return surrogate_moments(policy, surrogate)


def surrogate_moments(
    policy: TabularLM,
    surrogate: Callable[[Float[Tensor, "N T V"]], Float[Tensor, " N"]],
    sampler: TabularLM | None = None,
) -> Moments:
    """Mean `[P, V]` and variance (trace) of the gradient of any surrogate from one response.

    Args:
        policy: the model that is differentiated.
        surrogate: from `policy_logp` `[N, T, V]` of all responses, in the order of
            `policy.tokens` and `policy.mask`, to one value for each, `[N]`.
        sampler: the model that samples the response; None: the policy.
    """

    def per_response(logits: Tensor) -> Tensor:
        return surrogate(policy.with_logits(logits).policy_logp())

    gradients = torch.autograd.functional.jacobian(
        per_response, policy.logits.detach(), vectorize=True
    )
    assert isinstance(gradients, Tensor)  # one input, one output
    return response_moments(policy if sampler is None else sampler, gradients)  # [N, P, V]


def response_moments(sampler: TabularLM, samples: Float[Tensor, "N ..."]) -> Moments:
    """Σ_y μ(y) x(y) and Σ_y μ(y) ‖x(y) - mean‖², μ the model that samples.

    Responses that are never sampled have no say, whatever x is there.

    Args:
        sampler: the model μ.
        samples: x of every response, in the order of `sampler.tokens`.

    Example:
        >>> lm = TabularLM(torch.zeros(1, 2), length=1)
        >>> mean, variance = response_moments(lm, torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> mean.item(), variance.item()
        (2.0, 1.0)
    """
    prob = sampler.response_logp().detach().exp()
    prob, flat = prob[prob > 0], samples.detach().reshape(len(prob), -1)[prob > 0]
    mean = prob @ flat
    variance = prob @ (flat - mean).square().sum(1)
    return Moments(mean.view(samples.shape[1:]), variance)


def _token_logp(policy_logp: Float[Tensor, "N T V"], tokens: Int[Tensor, "N T"]) -> Tensor:
    """Log-probability of each token, `[N, T]`."""
    return policy_logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _check_same_responses(policy: TabularLM, ref: TabularLM) -> None:
    spaces = [(lm.logits.shape[1], lm.length, lm.eos) for lm in (policy, ref)]
    if spaces[0] != spaces[1]:
        raise ValueError(
            f"policy has (vocabulary, length, eos) {spaces[0]} and ref {spaces[1]}; a KL needs two "
            "models of the same responses: build both with the same three"
        )


@dataclass(frozen=True)
class _Responses:
    prefixes: tuple[tuple[int, ...], ...]
    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    prefix_rows: Int[Tensor, "N T"]


@lru_cache
def _enumerate(vocab_size: int, length: int, eos: int | None) -> _Responses:
    """Every prefix and every response of a tabular model."""
    if length < 1:
        raise ValueError(f"length is {length}; a response has at least one token, use length >= 1")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"eos is {eos}; use a token of 0..{vocab_size - 1}, or None for no eos")
    prefixes: list[tuple[int, ...]] = []
    responses: list[tuple[int, ...]] = []
    unfinished: list[tuple[int, ...]] = [()]
    for _ in range(length):
        prefixes += unfinished
        if eos is not None:
            responses += [(*prefix, eos) for prefix in unfinished]
        unfinished = [(*prefix, v) for prefix in unfinished for v in range(vocab_size) if v != eos]
    responses += unfinished  # cut at `length`

    row = {prefix: i for i, prefix in enumerate(prefixes)}
    padding = [(0,) * (length - len(y)) for y in responses]
    rows = [[row[y[:t]] for t in range(len(y))] for y in responses]
    return _Responses(
        prefixes=tuple(prefixes),
        tokens=torch.tensor([y + pad for y, pad in zip(responses, padding, strict=True)]),
        mask=torch.tensor([[t < len(y) for t in range(length)] for y in responses]),
        prefix_rows=torch.tensor([[*r, *pad] for r, pad in zip(rows, padding, strict=True)]),
    )
