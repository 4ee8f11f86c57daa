"""Where the KL enters an update: as a reward, as a loss, or both; and the surrogate for each.

The sequence KL depends on θ twice: through which prefixes the policy visits, and through what each
token's KL is at a given prefix. Its gradient has one term for each (D_t is the exact KL at the
prefix of token t, g_t = ∇log π(y_t | prefix)):

    ∇D_KL(policy ‖ ref) = E[ Σ_t g_t Σ_{s>t} D_s ]   +   E[ Σ_t ∇D_t ]
                          the future: "reward"           the pathwise part: "loss"

- `reward`: Σ_t token_logp_t · sg(future KL at t). The score-function term; k itself is detached.
- `loss`: Σ_t k_t, differentiated; the visited prefixes are held fixed.
- `both`: their sum, the product rule for ∇E[Σ_t k_t]. It gives the true gradient for *every*
  estimator k that is unbiased.

Which estimator may stand alone in which placement is claimed in `rlkl.kl.estimators` and enforced
by its `check_placement`.

The future of token t starts at s = t if k_t depends on y_t (k1, k2, k3: `own_token=True`), and at
s = t + 1 if it depends on the prefix only (rb: `own_token=False`). In the second case D_t is a
constant to y_t, so E[g_t D_t] = 0: keeping it would not bias the gradient, only add noise.
"""

from enum import StrEnum

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlkl.kl.shapes import check_per_token


class KLPlacement(StrEnum):
    """Where an estimate of the KL enters the update; compares equal to its name.

    >>> KLPlacement("both") == "both"
    True
    """

    REWARD = "reward"
    LOSS = "loss"
    BOTH = "both"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"placement {value!r} is unknown; use 'reward', 'loss' or 'both'")


def kl_surrogate(
    k: Float[Tensor, "B T"],
    token_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    placement: KLPlacement | str,
    *,
    own_token: bool = True,
) -> Float[Tensor, " B"]:
    """A scalar per response whose gradient estimates ∇D_KL(policy ‖ ref) of the sequence.

        reward:  Σ_t token_logp_t · sg(Σ_{s≥t} k_s)      (s > t if not own_token)
        loss:    Σ_t k_t
        both:    the sum of the two

    Only the gradient has a meaning; the *value* is not the KL (for that, see `sequence_kl`). It
    flows through `token_logp` (reward, both) and `k` (loss, both). The gradient is that of the KL
    per response, to be averaged over B and minimised times the KL coefficient.

    Valid for tokens sampled from the policy that is differentiated, at its temperature and without
    truncation (top-k, top-p).

    Args:
        k: per-token estimate in nats; it must carry its graph in `loss` and `both`.
        token_logp: log π(y_t | prefix), with its graph.
        mask: True = response token. Masked positions count for nothing, be they nan or inf.
        placement: "reward", "loss" or "both".
        own_token: whether k_t depends on y_t; `estimator.claims.own_token`.

    Returns:
        `[B]`.

    Raises:
        ValueError: the placement is unknown, the shapes differ, or `mask` is not bool.

    Example:
        >>> token_logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> k, mask = torch.tensor([[0.3, 0.2]]), torch.tensor([[True, True]])
        >>> kl_surrogate(k, token_logp, mask, "reward").sum().backward()
        >>> token_logp.grad  # the KL that follows from each token, its own included
        tensor([[0.5000, 0.2000]])
    """
    placement = KLPlacement(placement)
    check_per_token(mask, k=k, token_logp=token_logp)
    surrogate = k.new_zeros(len(k))
    if placement is not KLPlacement.LOSS:
        future = future_kl(k, mask, own_token)
        surrogate = surrogate + (torch.where(mask, token_logp, 0.0) * future).sum(1)
    if placement is not KLPlacement.REWARD:
        surrogate = surrogate + torch.where(mask, k, 0.0).sum(1)
    return surrogate


def future_kl(
    k: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], own_token: bool
) -> Float[Tensor, "B T"]:
    """The KL that follows from each token: Σ_{s≥t} k_s, or Σ_{s>t} k_s if not `own_token`.

    Detached: it is a weight for g_t, not something to differentiate.

    Returns:
        `[B, T]` in nats, 0 where masked.

    Raises:
        ValueError: the shapes differ, or `mask` is not bool.

    Example:
        >>> future_kl(torch.tensor([[4.0, 2.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), False)
        tensor([[3., 1., 0.]])
    """
    check_per_token(mask, k=k)
    k = torch.where(mask, k, 0.0).detach()
    future = k.flip(1).cumsum(1).flip(1)
    if not own_token:
        future = _shift_left(future)
    return torch.where(mask, future, 0.0)


def kl_rewards(
    k: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], own_token: bool
) -> Float[Tensor, "B T"]:
    """The KL cost to charge at each token, so that costs summed from t on are `future_kl` at t.

    k_t where the estimate depends on y_t; otherwise k_{t+1}, the KL at the prefix that y_t leads
    to, and 0 at the last token. The reward of token t is -kl_coef · kl_rewards_t (plus the score).
    With rb, the KL at the first prefix is charged to nobody: no token of the response causes it.
    Detached.

    Returns:
        `[B, T]` in nats, 0 where masked.

    Raises:
        ValueError: not `own_token`, and a response is interrupted by masked positions, over which
            the shift would lose the KL; also if the shapes differ or `mask` is not bool.

    Example:
        >>> kl_rewards(torch.tensor([[4.0, 2.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), False)
        tensor([[2., 1., 0.]])
    """
    check_per_token(mask, k=k)
    k = torch.where(mask, k, 0.0).detach()
    if own_token:
        return k
    starts = mask[:, 1:] & ~mask[:, :-1]
    if bool((starts.sum(1) + mask[:, 0].long() > 1).any()):
        raise ValueError(
            "mask interrupts a response; with own_token=False each row of mask must be one run of "
            "True (pad on one side only), or use an estimator that is charged at its own token (k1)"
        )
    return torch.where(mask, _shift_left(k), 0.0)


def _shift_left(x: Tensor) -> Tensor:
    """x_{t+1} at t, and 0 at the end."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))
