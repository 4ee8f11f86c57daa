"""What every token-level estimator is: a name, claims, and k_t from two distributions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.placement import KLPlacement
from rlkl.kl.shapes import check_bool

# Probabilities that were rounded to 16 bits sum to 1 within a few hundredths.
_NOT_NORMALISED = 0.1


@dataclass(frozen=True)
class Claims:
    """What an estimator promises of its k_t; each field is tested by enumeration."""

    unbiased: bool
    """E[Σ_t k_t] is D_KL(policy ‖ ref) of the sequence."""

    non_negative: bool
    """k_t ≥ 0 at every token."""

    needs: Literal["token_logp", "distributions"]
    """Log-probs of the sampled token, or the whole next-token distributions."""

    own_token: bool
    """The future KL of token t includes k_t itself: k_t depends on y_t, and ∇k_t alone misses it.

    False where E[∇k_t | h_t] is already ∇E[k_t | h_t] = ∇D_t (of an unbiased estimate), since k_t
    depends on the prefix only (rb) or carries its own score-function term (topk).
    """

    other_gradient: Mapping[KLPlacement, str] = field(hash=False)
    """For each placement that does not give ∇D_KL of the sequence: the gradient that it gives."""

    @property
    def exact_gradient(self) -> frozenset[KLPlacement]:
        """The placements in which the expected gradient is exactly that of the sequence KL."""
        return frozenset(p for p in KLPlacement if p not in self.other_gradient)


@dataclass(frozen=True)
class Estimator(ABC):
    """A per-token estimate of the KL, from the sampled token or from whole distributions."""

    name: str
    claims: Claims

    def __call__(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V_ref"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """k_t from next-token log-probabilities.

        Args:
            policy_logp: log π(·|h_t), at the temperature that sampled `tokens`.
            ref_logp: log q(·|h_t), at the same temperature.
            tokens: the sampled y_t.
            mask: True = response token. Padding may hold anything, nan and invalid ids included.

        Returns:
            `[B, T]` nats, at least float32, 0 where masked; differentiable in policy_logp. u_t
            counts as 0 at a token that the policy gives no probability, and so cannot have sampled
            (0 · log 0 = 0).

        Raises:
            ValueError: the vocabularies differ in size, the shapes do not fit, `mask` is not bool,
                or the first real token has logits in place of log-probabilities.
        """
        _check(policy_logp, ref_logp, tokens, mask)
        return self.per_token(
            _at_least_float32(policy_logp), _at_least_float32(ref_logp), tokens, mask
        )

    @abstractmethod
    def per_token(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """`__call__` of arguments that fit each other, in float32 or float64."""


def _check(policy_logp: Tensor, ref_logp: Tensor, tokens: Tensor, mask: Tensor) -> None:
    vocab_size, ref_vocab_size = policy_logp.shape[-1], ref_logp.shape[-1]
    if vocab_size != ref_vocab_size:
        raise ValueError(
            f"policy_logp has a vocabulary of {vocab_size} and ref_logp of {ref_vocab_size}: if "
            "one is only padded, cut the logits of both to the tokenizer's size before log_softmax"
        )
    shapes = [tuple(x.shape) for x in (policy_logp, ref_logp, tokens, mask)]
    if not (
        len(shapes[0]) == 3 and shapes[0] == shapes[1] and shapes[0][:2] == shapes[2] == shapes[3]
    ):
        raise ValueError(
            "policy_logp, ref_logp, tokens and mask have shapes "
            f"{', '.join(map(str, shapes))}; pass [B, T, V], [B, T, V], [B, T] and [B, T]"
        )
    check_bool(mask)
    if not torch.compiler.is_compiling() and mask.any():
        b, t = divmod(int(mask.flatten().int().argmax()), mask.shape[1])
        for name, logp in (("policy_logp", policy_logp), ("ref_logp", ref_logp)):
            _check_normalised(f"{name}[{b}, {t}]", logp[b, t])


def _check_normalised(name: str, logp: Tensor) -> None:
    """Refuses logits, of which a sampled log-ratio is wrong by the difference of two log-sums."""
    log_total = float(logp.detach().float().logsumexp(-1))
    if math.isfinite(log_total) and abs(log_total) > _NOT_NORMALISED:
        raise ValueError(
            f"{name} is no distribution: log Σ exp of it is {log_total:.4g}, not 0; pass "
            "log-probabilities, (logits / temperature).log_softmax(-1), of the whole vocabulary"
        )


def _at_least_float32(logp: Tensor) -> Tensor:
    """Sums of 16-bit log-probabilities are those of their values, not rounded again."""
    return logp.to(torch.promote_types(logp.dtype, torch.float32))
