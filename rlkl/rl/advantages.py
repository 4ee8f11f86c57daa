"""Generalised advantage estimation, leave-one-out baselines and whitening over response tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and returns of finite episodes that end at their last real token.

    δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   R_t = A_t + V_t, with V = A = 0 past
    the end; t + 1 is the next *real* token, over masked positions in between (padding, what a tool
    wrote between two turns of the policy).

    A response cut at the length limit is treated as ended there: the objective is that of the
    process of that length.

    Reference: High-Dimensional Continuous Control Using Generalized Advantage Estimation
    (Schulman et al., 2015), https://arxiv.org/abs/1506.02438.

    Args:
        rewards: reward of each token.
        values: V_t, the prediction made at the prefix *before* token t.
        mask: True at real tokens, wherever they are.
        gamma: discount γ.
        lam: λ = 1 gives reward-to-go minus value, λ = 0 the one-step error.

    Returns:
        Advantages and returns, 0 where masked, without gradient.

    Example:
        >>> mask = torch.tensor([[True, True]])
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
        >>> advantages, returns
        (tensor([[0.5000, 0.7500]]), tensor([[1., 1.]]))
    """
    rewards = rewards.detach().masked_fill(~mask, 0.0)
    values = values.detach().masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage).masked_fill(~mask[:, t], 0.0)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantages[:, t], next_advantage)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def leave_one_out_mean(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """At each position the mean of the other responses that reach it, as a baseline.

    b_it = Σ_{j≠i} m_jt x_jt / Σ_{j≠i} m_jt, and 0 where no other response is that long. It does not
    depend on response i, so that E[∇log π(y_it) b_it] = 0; the mean of all responses does depend on
    it, and shrinks the gradient. The gain in variance is no law: it grows with the batch and with
    what all responses have in common, and can be a loss where many end at once.

    Reference: Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019),
    https://openreview.net/forum?id=r1lgTGL5DE.

    Args:
        x: what follows from each token, such as a return or `rlkl.kl.future_kl`; responses are
            independent draws.
        mask: True at real tokens.

    Returns:
        `[B, T]` in the unit of `x`, without gradient, 0 where masked.

    Example:
        >>> x = torch.tensor([[1.0, 9.0], [3.0, 0.0], [5.0, 0.0]])
        >>> leave_one_out_mean(x, torch.tensor([[True, True], [True, False], [True, False]]))
        tensor([[4., 0.],
                [3., 0.],
                [2., 0.]])
    """
    x = torch.where(mask, x, 0.0).detach()
    others = mask.sum(0) - mask.long()
    mean = (x.sum(0) - x) / others.clamp(min=1)
    return torch.where(mask & (others > 0), mean, 0.0)


def whiten(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, shift_mean: bool = True
) -> tuple[Float[Tensor, "B T"], Float[Tensor, ""]]:
    """Scales the real tokens to variance 1 (and mean 0), and says by how much.

    (x − m) / σ with m, σ over the real tokens of the whole batch; ``shift_mean=False`` keeps the
    mean. The scale σ is returned because every other channel of the same objective has to be
    divided by it too: a KL penalty that is differentiated in the loss beside whitened advantages
    is β / σ, or whitening silently changes the KL coefficient.

    Args:
        x: values at response tokens.
        mask: True at real tokens; at least two of them.
        shift_mean: subtract the mean.

    Returns:
        The whitened tensor, 0 where masked, and σ; σ = 1 for a constant x, which has no scale.

    Raises:
        ValueError: `mask` has no True.

    Example:
        >>> x, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> whiten(x, mask)
        (tensor([[-1.,  1.,  0.]]), tensor(1.))
    """
    real = x[mask]
    if not len(real):
        raise ValueError("mask has no True; there is nothing to whiten")
    mean = real.mean()
    scale = (real - mean).square().mean().sqrt()
    rounding = 8 * torch.finfo(x.dtype).eps * real.abs().max()  # a constant's mean is not exact
    scale = torch.where(scale > rounding, scale, torch.ones_like(scale))
    shifted = (x - mean) / scale if shift_mean else (x - mean) / scale + mean
    return shifted.masked_fill(~mask, 0.0), scale
