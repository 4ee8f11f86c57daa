"""Per-token rewards: the response's score at its last token, less the KL penalty."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_rewards(
    scores: Float[Tensor, " B"],
    kl_cost: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    kl_coef: float,
) -> Float[Tensor, "B T"]:
    """r_t = score·1[t = last] − β c_t, with c_t the KL cost that falls on token t.

    For an estimate that depends on the sampled token (k1) c_t = k_t; for the exact token KL it is
    k_{t+1}, the KL at the prefix to which y_t leads: see :func:`rlkl.kl.kl_rewards`.

    Args:
        scores: one score per response.
        kl_cost: nats per token, detached.
        mask: True at real tokens, of which each row has at least one.
        kl_coef: β ≥ 0.

    Returns:
        Rewards, 0 where masked.

    Raises:
        ValueError: a response without a token, at which its score would be due.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> token_rewards(torch.tensor([2.0]), torch.tensor([[0.5, 1.0, 0.0]]), mask, 0.1)
        tensor([[-0.0500,  1.9000,  0.0000]])
    """
    rewards = (-kl_coef * kl_cost).masked_fill(~mask, 0.0)
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"response {row} has no token for its score: leave such rows out")
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def penalise_missing_eos(
    scores: Float[Tensor, " B"], ended: Bool[Tensor, " B"], penalty: float | None
) -> Float[Tensor, " B"]:
    """Subtracts `penalty` from the score of every response that was cut before it ended.

    Example:
        >>> import torch
        >>> penalise_missing_eos(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.5)
        tensor([1.0000, 0.5000])
    """
    return scores if penalty is None else scores - penalty * (~ended).to(scores.dtype)
