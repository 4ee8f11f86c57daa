"""Models to try the fused functions on, and the definitions to compare them with."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkl.kl import TokenLogp, TokenStats

STATISTICS = ("policy_logp", "kl", "entropy")


class Case(NamedTuple):
    """Arguments of fused_token_stats; different hidden sizes of policy and reference."""

    policy_hidden: Tensor
    policy_head: Tensor
    policy_bias: Tensor
    ref_hidden: Tensor
    ref_head: Tensor
    ref_bias: Tensor
    tokens: Tensor

    @property
    def positional(self) -> tuple[Tensor, ...]:
        return self.policy_hidden, self.policy_head, self.ref_hidden, self.ref_head, self.tokens

    @property
    def bias(self) -> dict[str, Tensor]:
        return {"policy_bias": self.policy_bias, "ref_bias": self.ref_bias}

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(*(x.to(dtype) if x.is_floating_point() else x for x in self))

    def leaves(self) -> tuple["Case", list[Tensor]]:
        """A copy whose policy tensors require gradients."""
        policy = [x.detach().clone().requires_grad_() for x in self[:3]]
        return Case(*policy, *self[3:]), policy


def make(n: int = 29, vocab: int = 101, hidden: int = 7, ref: int = 11, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    tokens = torch.randint(vocab, (n,), generator=g)
    policy = normal(n, hidden), normal(vocab, hidden), normal(vocab)
    return Case(*policy, normal(n, ref), normal(vocab, ref) / 2, normal(vocab), tokens)


def shifted(case: Case, size: float) -> Case:
    """The same policy beside a reference that differs from it by about `size` in every logit."""
    g = torch.Generator().manual_seed(1)
    head = case.policy_head
    ref_head = head + size * torch.randn(head.shape, generator=g, dtype=head.dtype)
    bias = torch.zeros_like(case.policy_bias)
    return Case(case.policy_hidden, head, bias, case.policy_hidden, ref_head, bias, case.tokens)


def naive(case: Case, temperature: float = 1.0) -> TokenStats:
    """The definitions, on the whole [N, V]."""
    policy = (case.policy_hidden @ case.policy_head.T + case.policy_bias) / temperature
    ref = (case.ref_hidden @ case.ref_head.T + case.ref_bias) / temperature
    policy, ref = policy.log_softmax(-1), ref.log_softmax(-1)
    p, possible = policy.exp(), policy > -torch.inf
    token = case.tokens[:, None]
    return TokenStats(
        policy.gather(1, token)[:, 0],
        ref.gather(1, token)[:, 0],
        torch.where(possible, p * (policy.where(possible, 0) - ref.where(possible, 0)), 0).sum(-1),
        -torch.where(possible, p * policy.where(possible, 0), 0).sum(-1),
    )


def combine(stats: TokenStats | TokenLogp, *weights: Tensor) -> Tensor:
    """A loss, not linear in log π(y), with another upstream gradient for every token."""
    loss = (weights[0] * stats.policy_logp.exp() + weights[1] * stats.entropy).sum()
    return loss + (weights[2] * stats.kl).sum() if isinstance(stats, TokenStats) else loss


def weights(n: int) -> Tensor:
    return torch.randn(3, n, generator=torch.Generator().manual_seed(2))


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def assert_close(got, expected, rtol: float, atol: float) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.to(y.dtype), y, rtol=rtol, atol=atol)


# The errors are those of the logits and of gradients rounded to the input's own dtype.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
