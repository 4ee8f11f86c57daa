"""Adaptive KL: forward and reverse KL, weighed by where the policy differs from the reference.

The reference's tokens, most likely first, are cut into a head and a tail. With the gaps

    g_head = Σ_head |q_v - π_v|,     g_tail = Σ_tail |q_v - π_v|

    AKL   = w D_KL(ref ‖ policy) + (1 - w) D_KL(policy ‖ ref),     w = g_head / (g_head + g_tail)
    AKL-r = (1 - w) D_KL(ref ‖ policy) + w D_KL(policy ‖ ref)

w is detached: no gradient flows through the weights. Equal distributions (0/0) have w = ½.

The head has two readings. `"within"`, the authors' published code: the tokens whose cumulative
probability is at most `head_mass`, and always the most likely one. `"reach"`: the smallest set of
most likely tokens whose mass reaches `head_mass`; it has one token more, unless the mass is met
exactly or the most likely token alone reaches it. Tokens of equal probability are taken in the
order of their ids by the functions here; the fused loss takes them in any order, since it has the
reference's probabilities up to rounding. Where a tie straddles the head's end, w may differ.

Reference: Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
Models (Wu et al., 2024), https://arxiv.org/abs/2404.02657.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlkl.kl.divergences import kl_of_logp, log_softmax_pair

HeadRule = Literal["within", "reach"]


class HeadTailGaps(NamedTuple):
    """Where two distributions differ, per position; all detached."""

    head: Float[Tensor, "*batch"]
    """Σ |q_v - π_v| over the reference's head: in [0, 2]."""
    tail: Float[Tensor, "*batch"]
    """The same over the tail; head and tail together are at most 2."""

    @property
    def forward_weight(self) -> Float[Tensor, "*batch"]:
        """W = head / (head + tail), and ½ where both are 0."""
        total = self.head + self.tail
        return torch.where(total > 0, self.head / total.where(total > 0, 1.0), 0.5)


def adaptive_kl(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    *,
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
    flipped: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """AKL = w D_KL(ref ‖ policy) + (1 - w) D_KL(policy ‖ ref) at each position, in nats.

    Differentiable in the policy's logits through both divergences, not through w.

    Args:
        policy_logits: `[..., V]`: the student.
        ref_logits: `[..., V]`, constant: the teacher.
        head_mass: the reference's probability that makes the head, in (0, 1].
        head_rule: "within" (the published code) or "reach"; see the module.
        flipped: AKL-r, the two weights exchanged.
        temperature: divides both logits.

    Returns:
        `[...]`, ≥ 0, and 0 only for equal distributions.

    Raises:
        ValueError: the vocabularies differ in size; `head_mass` or `head_rule` is out of range.

    Example:
        >>> policy, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
        >>> print(f"{adaptive_kl(policy, ref):.4f}")  # both gaps ¼: w = ½
        0.1373
    """
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    w = gaps_of_logp(policy_logp, ref_logp, head_mass, head_rule).forward_weight
    if flipped:
        w = 1 - w
    return weighted_kl(kl_of_logp(ref_logp, policy_logp), kl_of_logp(policy_logp, ref_logp), w)


def weighted_kl(
    forward: Float[Tensor, "*batch"], reverse: Float[Tensor, "*batch"], w: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """W · forward + (1 - w) · reverse, in which an infinite part of no weight does not count.

    Example:
        >>> weighted_kl(torch.tensor(torch.inf), torch.tensor(2.0), torch.tensor(0.0))
        tensor(2.)
    """
    return torch.where(w > 0, w * forward, 0.0) + torch.where(w < 1, (1 - w) * reverse, 0.0)


def head_tail_gaps(
    policy_logits: Float[Tensor, "*batch V"],
    ref_logits: Float[Tensor, "*batch V_ref"],
    *,
    head_mass: float = 0.5,
    head_rule: HeadRule = "within",
    temperature: float = 1.0,
) -> HeadTailGaps:
    """Σ |q_v - π_v| over the head and over the tail of the reference, at each position.

    Arguments and errors are those of `adaptive_kl`. No gradient.

    Example:
        >>> policy = torch.tensor([0.4, 0.3, 0.3]).log()
        >>> ref = torch.tensor([0.5, 0.3, 0.2]).log()
        >>> head, tail = head_tail_gaps(policy, ref)
        >>> print(f"{head:.2f} {tail:.2f}")
        0.10 0.10
    """
    policy_logp, ref_logp = log_softmax_pair(policy_logits, ref_logits, temperature)
    return gaps_of_logp(policy_logp, ref_logp, head_mass, head_rule)


def reference_head(
    ref_logp: Float[Tensor, "*batch V"], head_mass: float = 0.5, head_rule: HeadRule = "within"
) -> Bool[Tensor, "*batch V"]:
    """Which tokens are the head of the reference, given its log-probabilities.

    Raises:
        ValueError: `head_mass` is not in (0, 1], or `head_rule` is unknown.

    Example:
        >>> reference_head(torch.tensor([0.3, 0.6, 0.1]).log(), 0.8)
        tensor([False,  True, False])
        >>> reference_head(torch.tensor([0.3, 0.6, 0.1]).log(), 0.8, "reach")
        tensor([ True,  True, False])
    """
    if not 0 < head_mass <= 1:
        raise ValueError(f"head_mass={head_mass}: must lie in (0, 1]")
    if head_rule not in get_args(HeadRule):
        raise ValueError(f"head_rule={head_rule!r}: use 'within' or 'reach'")
    q, order = ref_logp.exp().sort(dim=-1, descending=True, stable=True)
    mass = q.cumsum(-1)
    in_head = mass <= head_mass if head_rule == "within" else mass - q < head_mass
    in_head[..., 0] = True
    if head_mass == 1:  # all of it, whatever the rounding of the sum
        in_head[...] = True
    return torch.empty_like(in_head).scatter_(-1, order, in_head)


@torch.no_grad()
def gaps_of_logp(
    policy_logp: Tensor, ref_logp: Tensor, head_mass: float, head_rule: HeadRule
) -> HeadTailGaps:
    """`head_tail_gaps` of log-probabilities."""
    gap = (ref_logp.exp() - policy_logp.exp()).abs()
    in_head = reference_head(ref_logp, head_mass, head_rule)
    return HeadTailGaps(
        torch.where(in_head, gap, 0.0).sum(-1), torch.where(in_head, 0.0, gap).sum(-1)
    )
