"""PPO's clipped losses, per token: averaging is the caller's, the same for every channel.

Reference: Proximal Policy Optimization Algorithms (Schulman et al., 2017),
https://arxiv.org/abs/1707.06347, equations 7 and 9.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_policy_loss(
    logp: Float[Tensor, " N"],
    old_logp: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    cliprange: float = 0.2,
) -> Float[Tensor, " N"]:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) with ρ = π(y)/π_old(y); equation 7, negated.

    Differentiable in `logp`; `old_logp` and `advantages` are treated as constants. Tokens must
    have been sampled from π_old.

    Example:
        >>> logp = torch.tensor([0.0, 0.5]).requires_grad_()
        >>> clipped_policy_loss(logp, torch.zeros(2), torch.ones(2)).detach()
        tensor([-1.0000, -1.2000])
    """
    ratio = (logp - old_logp.detach()).exp()
    advantages = advantages.detach()
    return -torch.minimum(
        ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    )


def clipped_value_loss(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    cliprange: float = 0.2,
) -> Float[Tensor, " N"]:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), the value loss of the PPO baselines.

    Differentiable in `values` only. ε is in the units of the return, not a ratio.

    Example:
        >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.3200])
    """
    clipped = old_values.detach() + (values - old_values.detach()).clamp(-cliprange, cliprange)
    returns = returns.detach()
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
