"""What a PPO step keeps of itself: seconds of its parts, and what its updates did."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkl.kl import effective_sample_size
from rlkl.trainers.config import PPOConfig


class StepClock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`."""
        begin = time.perf_counter()
        yield
        self.seconds[f"time/{part}"] += time.perf_counter() - begin


@dataclass(frozen=True)
class Update:
    """One optimiser step: its losses, and how far policy and critic stood from the rollout's."""

    loss: Tensor
    policy_loss: Tensor
    kl_loss: Tensor
    value_loss: Tensor
    log_ratio: Tensor
    """[N] log π(y_t) − log π_old(y_t)"""
    value_change: Tensor
    """[N] V − V_old"""
    prefix_weight: Tensor
    """[N] Π_{s<t} π(y_s)/π_old(y_s)"""
    response_weight: Tensor
    """[B] π(y)/π_old(y)"""

    @classmethod
    def join(cls, parts: Sequence["Update"]) -> "Update":
        """The update whose gradient was accumulated over `parts`, each with its share of it."""

        def total(name: str) -> Tensor:
            return torch.stack([getattr(part, name) for part in parts]).sum()

        return cls(
            loss=total("loss"),
            policy_loss=total("policy_loss"),
            kl_loss=total("kl_loss"),
            value_loss=total("value_loss"),
            log_ratio=torch.cat([part.log_ratio for part in parts]),
            value_change=torch.cat([part.value_change for part in parts]),
            prefix_weight=torch.cat([part.prefix_weight for part in parts]),
            response_weight=torch.cat([part.response_weight for part in parts]),
        )


def update_metrics(
    updates: Sequence[Update], cliprange: float, cliprange_value: float, weight_bound: float
) -> dict[str, float]:
    """Losses and ratios of a step's updates, by the names and formulas of the vocabulary."""
    log_ratio = torch.cat([update.log_ratio for update in updates])
    value_change = torch.cat([update.value_change for update in updates])
    prefix_weight = torch.cat([update.prefix_weight for update in updates])
    last = updates[-1].response_weight
    ratio = log_ratio.exp()

    def mean(name: str) -> float:
        return float(torch.stack([getattr(update, name) for update in updates]).mean())

    return {
        "loss/policy_avg": mean("policy_loss"),
        "loss/value_avg": mean("value_loss"),
        "loss/kl_avg": mean("kl_loss"),
        "policy/approxkl_avg": float((torch.expm1(log_ratio) - log_ratio).mean()),
        "policy/clipfrac_avg": float(((ratio - 1).abs() > cliprange).float().mean()),
        "val/clipfrac_avg": float((value_change.abs() > cliprange_value).float().mean()),
        "val/ratio": float(ratio.mean()),
        "val/ratio_var": float(ratio.var(correction=0)),
        "val/ess_fraction": float(effective_sample_size(last)) / len(last),
        "val/truncated_fraction": float((prefix_weight > weight_bound).float().mean()),
        "val/first_ratio_error": float((updates[0].log_ratio.exp() - 1).abs().max()),
    }


def responses_after(steps: int, batches_per_epoch: int, prompts: int, args: PPOConfig) -> int:
    """Responses sampled in the first steps of a run.

    The last step of an epoch may have fewer (of one process: accelerate fills the batches of
    several).

    Args:
        steps: of the run.
        batches_per_epoch: steps of a pass over the prompts.
        prompts: how many there are.
        args: batch, processes, and responses to each prompt.
    """
    epochs, rest = divmod(steps, batches_per_epoch)
    batch = args.per_device_train_batch_size * args.world_size
    epoch = batches_per_epoch * batch
    if args.world_size == 1:
        epoch = min(epoch, prompts)
    return (epochs * epoch + rest * batch) * args.num_generations


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(R − V) / Var(R): 1 is a perfect critic, 0 one that knows nothing, nan without spread.

    >>> explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    1.0
    """
    variance = returns.var(correction=0)
    if variance == 0:
        return math.nan
    return float(1 - (returns - values).var(correction=0) / variance)
