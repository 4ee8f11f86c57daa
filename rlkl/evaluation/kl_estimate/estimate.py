"""The KL between two language models, estimated: sample, measure, add up, until there is enough."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlkl.evaluation.kl_estimate.accumulate import Accumulator, Weights
from rlkl.evaluation.kl_estimate.draws import Draws, sampled
from rlkl.evaluation.kl_estimate.measure import Measured, VocabularySums, measure
from rlkl.evaluation.kl_estimate.report import (
    KLReport,
    Likely,
    Sample,
    SampleToken,
    TokenShare,
    WideContext,
)
from rlkl.evaluation.kl_estimate.units import Estimand, Units
from rlkl.kl import ESTIMATORS
from rlkl.models import ModelPair

_KEPT_SAMPLES = 8
_TOP_TOKENS = 20
_MIN_SAMPLES = 64
"""Before this many responses a standard error is too rough to stop by."""


@dataclass(frozen=True)
class Sampling:
    """How much is sampled, and how."""

    num_samples: int = 256
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    target_stderr: float | None = None
    """In nats per response: go on after `num_samples` until the headline's error is this small."""
    max_samples: int = 65_536
    """With `target_stderr`: stop here in any case."""
    headline: str = "rb"
    estimand: Estimand = Estimand.POPULATION

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size", "max_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be positive and finite")
        if self.target_stderr is not None and not 0 < self.target_stderr < float("inf"):
            raise ValueError(f"target_stderr={self.target_stderr}: must be positive and finite")
        if self.target_stderr is not None and self.max_samples < self.num_samples:
            raise ValueError(
                f"max_samples={self.max_samples} is less than num_samples={self.num_samples}"
            )
        if self.headline not in ESTIMATORS:
            raise ValueError(
                f"headline={self.headline!r}: use one of {', '.join(ESTIMATORS)}"
            )

    @property
    def limit(self) -> int:
        """Responses that will be drawn at most."""
        return self.num_samples if self.target_stderr is None else self.max_samples
