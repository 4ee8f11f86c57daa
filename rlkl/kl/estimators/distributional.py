"""Estimators that see whole next-token distributions: rb, topk, topk_bucket."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlkl.kl.divergences import reverse_kl
from rlkl.kl.estimators.base import Claims, Estimator
from rlkl.kl.placement import KLPlacement


@final
@dataclass(frozen=True)
class RaoBlackwellEstimator(Estimator):
    """k_t = D_t, the exact token KL: u_t averaged over the token, E[u_t | h_t].

    Each token's variance falls, and that of a response as a rule: the sampled token's own noise is
    gone. It is no theorem for the sum, since the covariance *between* tokens changes too. With
    π₁ = (.5, .5), q₁ = (.25, .75), then π = q = (.5, .5) after token 0, and π = (.01, .99),
    q = (.99, .01) after token 1, the mean is 2.39545, Var(Σ u_t) = 3.31591 and
    Var(Σ D_t) = 5.06974: u_1 is negatively correlated with D_2, and averaging it out loses that.

    Reference:
        Better Estimation of the KL Divergence Between Language Models (Amini, Vieira and Cotterell,
        2025), https://arxiv.org/abs/2504.10637

    Example:
        >>> policy_logp = torch.tensor([[[0.5, 0.5]]]).log()
        >>> ref_logp = torch.tensor([[[0.25, 0.75]]]).log()
        >>> tokens, mask = torch.tensor([[0]]), torch.tensor([[True]])
        >>> RB(policy_logp, ref_logp, tokens, mask)
        tensor([[0.1438]])
    """

    def per_token(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """D_t, whatever token was sampled."""
        return self.from_distributions(*_fill_masked(policy_logp, ref_logp, mask))

    def from_distributions(
        self, policy_logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]
    ) -> Float[Tensor, "*shape"]:
        """D_t from log-probabilities or logits; `rlkl.kl.fused` has it from hidden states."""
        return reverse_kl(policy_logp, ref_logp)


@final
@dataclass(frozen=True)
class TopKEstimator(Estimator):
    """k_t = Σ_{v∈S} π_v u_v + 1[y_t ∉ S] u_t: exact over the k likeliest tokens, sampled beyond.

    u_v = log π(v|h_t) - log q(v|h_t), and S = S_k(h_t) are the top k tokens of the policy, treated
    as fixed where differentiated. Unbiased: E[1[y_t ∉ S] u_t | h_t] is the tail of D_t. What is
    left of the sampling noise is that of the tail; with k ≥ V nothing is left, and k_t = D_t.

    The gradient is unbiased as well: the head is differentiated, and the tail is written as
    1[y_t ∉ S] · (a_t (u_t + 1) - 1), where a_t = π(y_t|h_t) / sg(π(y_t|h_t)) is 1 in value and u_t
    detached from the policy. So E[∇k_t | h_t] = ∇D_t, and the reward side sums k_s over s > t.

    k_t itself may be negative: a head alone is no divergence.

    Reference:
        EMA Policy Gradient: Taming Reinforcement Learning for LLMs with EMA Anchor and Top-k KL
        (Zhang and Ba, 2026), https://arxiv.org/abs/2602.04417

    Raises:
        ValueError: `k` is below 1.

    Example:
        >>> from dataclasses import replace
        >>> policy_logp = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
        >>> ref_logp = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
        >>> mask = torch.tensor([[True]])
        >>> top1 = replace(TOPK, k=1)
        >>> top1(policy_logp, ref_logp, torch.tensor([[0]]), mask)  # ½ log 2: the head
        tensor([[0.3466]])
        >>> top1(policy_logp, ref_logp, torch.tensor([[2]]), mask)  # and log 0.4 of the tail
        tensor([[-0.5697]])
    """

    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)

    def per_token(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """Exact head plus sampled tail."""
        policy_logp, ref_logp = _fill_masked(policy_logp, ref_logp, mask)
        if self.k >= policy_logp.shape[-1]:
            return reverse_kl(policy_logp, ref_logp)  # the same, with all digits of a small KL
        head = _top_k(policy_logp, self.k)  # [B, T, k]
        head_logp, head_ref = policy_logp.gather(-1, head), ref_logp.gather(-1, head)
        p = head_logp.exp()
        log_ratio = torch.where(p == 0, 0.0, head_logp - head_ref)  # 0 · log 0 = 0
        exact = (p * log_ratio).sum(-1)  # [B, T]

        token = torch.where(mask, tokens, 0).long().unsqueeze(-1)  # [B, T, 1]
        logp = policy_logp.gather(-1, token).squeeze(-1)
        in_tail = (head != token).all(-1) & mask & (logp > -torch.inf)
        # Masked before the formula, so that a token of the head leaves no gradient behind.
        logp = torch.where(in_tail, logp, 0.0)
        ref = torch.where(in_tail, ref_logp.gather(-1, token).squeeze(-1), 0.0)
        log_ratio = logp.detach() - ref
        a = (logp - logp.detach()).exp()
        return exact + a * log_ratio + (a - 1)  # a (u + 1) - 1 with every digit of u kept


@final
@dataclass(frozen=True)
class TopKBucketEstimator(Estimator):
    """k_t = D_t of k + 1 categories: the k likeliest tokens of the policy, and all others as one.

        k_t = Σ_{v∈S} π_v log(π_v / q_v) + π(S̄) log(π(S̄) / q(S̄)) ≤ D_t,    S̄ the tail of S

    A lower bound of the token KL by the log-sum inequality: how the two distributions differ
    *within* the tail is not seen. Deterministic in the prefix, like rb. S = S_k(h_t) are the top k
    tokens of the policy, treated as fixed where differentiated; with k ≥ V, k_t = D_t.

    Raises:
        ValueError: `k` is below 1.

    Example:
        >>> from dataclasses import replace
        >>> policy_logp = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
        >>> ref_logp = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
        >>> token, mask = torch.tensor([[0]]), torch.tensor([[True]])
        >>> replace(TOPK_BUCKET, k=1)(policy_logp, ref_logp, token, mask)
        tensor([[0.1438]])
        >>> RB(policy_logp, ref_logp, token, mask)
        tensor([[0.2180]])
    """

    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)

    def per_token(
        self,
        policy_logp: Float[Tensor, "B T V"],
        ref_logp: Float[Tensor, "B T V"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """KL of head and bucket, whatever token was sampled."""
        policy_logp, ref_logp = _fill_masked(policy_logp, ref_logp, mask)
        if self.k >= policy_logp.shape[-1]:
            return reverse_kl(policy_logp, ref_logp)
        head = _top_k(policy_logp, self.k)

        def categories(logp: Tensor) -> Tensor:
            tail = logp.scatter(-1, head, -torch.inf)
            empty = (tail == -torch.inf).all(-1, keepdim=True)  # no gradient, rather than nan
            tail = tail.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
            tail = tail.masked_fill(empty, -torch.inf)
            return torch.cat([logp.gather(-1, head), tail], -1)  # [B, T, k + 1]

        return reverse_kl(categories(policy_logp), categories(ref_logp))


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; the head has at least one token, use k >= 1")


def _top_k(policy_logp: Float[Tensor, "*shape V"], k: int) -> Int[Tensor, "*shape k"]:
    """The k likeliest tokens of the policy."""
    return policy_logp.detach().topk(min(k, policy_logp.shape[-1]), -1).indices


def _fill_masked(policy_logp: Tensor, ref_logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Equal distributions where masked: their KL is 0, and no nan of padding reaches a gradient."""
    real = mask.unsqueeze(-1)
    return torch.where(real, policy_logp, 0.0), torch.where(real, ref_logp, 0.0)


_OWN_TOKEN_DROPPED = (
    "the own-token gradient Σ_t E[∇D_t] is dropped: only the KL of later prefixes is held"
)
_TOKEN_LEVEL = (
    "it is the token-level gradient Σ_t E[∇D_t]: how a token changes the KL of later prefixes is "
    "left out"
)

RB = RaoBlackwellEstimator(
    name="rb",
    claims=Claims(
        unbiased=True,
        non_negative=True,
        needs="distributions",
        own_token=False,
        other_gradient={
            KLPlacement.REWARD: _OWN_TOKEN_DROPPED,
            KLPlacement.LOSS: _TOKEN_LEVEL,
        },
    ),
)

TOPK = TopKEstimator(
    name="topk",
    k=64,
    claims=Claims(
        unbiased=True,
        non_negative=False,
        needs="distributions",
        own_token=False,
        other_gradient={
            KLPlacement.REWARD: _OWN_TOKEN_DROPPED,
            KLPlacement.LOSS: _TOKEN_LEVEL,
        },
    ),
)

TOPK_BUCKET = TopKBucketEstimator(
    name="topk_bucket",
    k=64,
    claims=Claims(
        unbiased=False,
        non_negative=True,
        needs="distributions",
        own_token=False,
        other_gradient={
            KLPlacement.REWARD: "it is that of a lower bound, ∇E[Σ k_t], less its own-token "
            "gradient Σ_t E[∇k_t]",
            KLPlacement.LOSS: "it is the token-level gradient of a lower bound, Σ_t E[∇k_t]: later "
            "prefixes and the differences within the tail are left out",
            KLPlacement.BOTH: "it is that of a lower bound, ∇E[Σ k_t]: differences within the tail "
            "are left out",
        },
    ),
)
