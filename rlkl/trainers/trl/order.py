"""The order of the prompts, by the epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class OrderOfEpoch(Sampler[int]):
    """TRL's sampler, whose order is that of an epoch, not of how often it was asked for one.

    A run that goes on in its third epoch has the order of the third. The Trainer calls `set_epoch`.
    """

    def __init__(self, sampler: RepeatSampler) -> None:
        self.sampler, self.epoch = sampler, 0

    def set_epoch(self, epoch: int) -> None:
        """Counts from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """TRL's order, each epoch's shuffle drawn after those of the epochs before."""
        trls = self.sampler
        if trls.shuffle and trls.seed is not None:
            trls.generator.manual_seed(trls.seed)
            for _ in range(self.epoch):
                torch.randperm(trls.num_samples, generator=trls.generator)
        return iter(trls)

    def __len__(self) -> int:
        return len(self.sampler)
