"""What the fused functions return."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class TokenStats(NamedTuple):
    """A token and the two next-token distributions at its position, in nats per token.

    Float32; float64 if any hidden state, head or bias is float64.
    """

    policy_logp: Float[Tensor, " N"]
    """log π(y): log-probability of the token under the policy."""
    ref_logp: Float[Tensor, " N"]
    """log q(y): log-probability of the token under the reference. Constant: no gradient."""
    kl: Float[Tensor, " N"]
    """D_KL(policy ‖ ref) of the next-token distributions, at least 0; or what was asked for."""
    entropy: Float[Tensor, " N"]
    """Entropy of the policy's next-token distribution."""


class TokenLogp(NamedTuple):
    """The policy's part of `TokenStats`, in nats per token."""

    policy_logp: Float[Tensor, " N"]
    """log π(y): log-probability of the token under the policy."""
    entropy: Float[Tensor, " N"]
    """Entropy of the policy's next-token distribution."""
