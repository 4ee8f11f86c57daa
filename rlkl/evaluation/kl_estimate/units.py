"""Sums over independent units, and the means, standard errors and intervals that follow.

Responses to one prompt are not independent draws from the population of prompts: what is, is the
prompt. So nothing is kept per response; each response is added to the sums of its unit u, and

    R = Σ_u S_u / Σ_u X_u,   stderr² = Σ_u m/(m - 1) (e_u - ē_u)² / (Σ_u X_u)²,   e_u = S_u - R X_u

(delta method for a ratio of sums; X counts responses for nats per response, tokens for nats per
token; m units vary together around ē). Which units, and around what, depends on the estimand:

    population      mean over the population that the prompts were drawn from. Units are prompts;
                    deviations are from R. Covers the draw of the prompts as well as of the
                    responses.
    given_prompts   mean over exactly these prompts. Each prompt is a stratum whose responses are
                    dealt to several units; deviations are from the stratum's own mean. Covers the
                    draw of the responses only; needs at least two responses per prompt.

With one prompt only the second makes sense, and is what is reported. Memory is bounded: beyond
1,024 prompts, prompts share units (group i takes the prompts i, i + 1024, ...), which are
independent still.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from scipy.stats import t as student_t
from torch import Tensor

MAX_UNITS = 1024
_MIN_UNITS = 64


class Estimand(StrEnum):
    """What the mean is a mean of."""

    POPULATION = "population"
    GIVEN_PROMPTS = "given_prompts"


@dataclass(frozen=True)
class Units:
    """Which unit a response belongs to.

    Example:
        >>> Units.of(3, Estimand.POPULATION).index(torch.tensor([0, 1, 2]), torch.tensor([0, 5, 5]))
        tensor([0, 1, 2])
    """

    strata: int
    replicates: int
    estimand: Estimand

    @classmethod
    def of(cls, num_prompts: int, estimand: Estimand) -> "Units":
        """Units for `num_prompts` prompts; a single prompt is always a given one."""
        if estimand is Estimand.POPULATION and num_prompts > 1:
            return cls(min(num_prompts, MAX_UNITS), 1, estimand)
        strata = min(num_prompts, MAX_UNITS // 2)
        return cls(strata, max(2, -(-_MIN_UNITS // strata)), Estimand.GIVEN_PROMPTS)

    def __len__(self) -> int:
        return self.strata * self.replicates

    def index(self, prompt: Tensor, repetition: Tensor) -> Tensor:
        """Unit of each response: [B], [B] -> [B], from its prompt's number and how many responses
        to that prompt came before.
        """
        return prompt % self.strata * self.replicates + repetition % self.replicates

    @property
    def stratum(self) -> Tensor:
        """[U] the stratum of each unit: one for all in a population, the prompt otherwise."""
        if self.estimand is Estimand.POPULATION:
            return torch.zeros(len(self), dtype=torch.long)
        return torch.arange(len(self)) // self.replicates


class UnitSums:
    """Named sums per unit, [U, ...] in float64; made as they are first added to."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self._sums: dict[str, Tensor] = {}

    def add(self, unit: Tensor, values: dict[str, Tensor]) -> None:
        """Adds each response's values [B, ...] to the sums of its unit [B].

        Values per position, [B, T], may be longer than those of earlier batches.
        """
        for name, value in values.items():
            value = value.detach().double().cpu()
            total = self._sums.get(name)
            if total is None or total.shape[1:] != value.shape[1:]:
                total = self._widened(total, value)
            width = value.shape[1:]
            target = total[:, : width[0]] if width else total
            target.index_add_(0, unit, value)
            self._sums[name] = total

    def _widened(self, total: Tensor | None, value: Tensor) -> Tensor:
        if total is None:
            return value.new_zeros(len(self.units), *value.shape[1:])
        if total.shape[1] >= value.shape[1]:
            return total
        return torch.cat([total, total.new_zeros(len(total), value.shape[1] - total.shape[1])], 1)

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name]

    def __contains__(self, name: str) -> bool:
        return name in self._sums


@dataclass(frozen=True)
class Interval:
    """A ratio of sums with its standard error and 95% interval; tensors of one shape."""

    mean: Tensor
    stderr: Tensor
    half_width: Tensor
    """Half of the 95% interval: Student's t, with as many degrees of freedom as units allow."""


def ratio(
    total: Tensor,
    size: Tensor,
    counts: Tensor,
    units: Units,
    max_freedom: float = math.inf,
) -> Interval:
    """R = Σ_u S_u / Σ_u X_u with its error, for S and X of shape [U, ...] -> [...].

    Units without responses do not count. With a single unit the error is inf: one draw says
    nothing of the spread.

    Args:
        total: S_u, sums of what is averaged.
        size: X_u, what it is averaged over: responses or tokens.
        counts: [U] responses per unit.
        units: of which the sums are.
        max_freedom: degrees of freedom of the interval at most, where the values rest on fewer
            effective units than there are.

    Example:
        >>> units = Units.of(2, Estimand.POPULATION)
        >>> one = torch.ones(2)
        >>> interval = ratio(torch.tensor([1.0, 3.0]), one, one, units)
        >>> float(interval.mean), float(interval.stderr)
        (2.0, 1.0)
    """
    used = counts > 0
    total, size, counts = total[used].double(), size[used].double(), counts[used].double()
    stratum = units.stratum[used]
    whole = size.sum(0)
    mean = total.sum(0) / whole
    error = total - mean * size
    members = torch.zeros(units.strata).double().index_add_(0, stratum, torch.ones_like(counts))
    responses = torch.zeros(units.strata).double().index_add_(0, stratum, counts)
    drift = error.new_zeros(units.strata, *error.shape[1:]).index_add_(0, stratum, error)
    shape = (-1, *[1] * (error.dim() - 1))
    expected = drift[stratum] / responses[stratum].view(shape) * counts.view(shape)
    m = members[stratum].view(shape)
    squares = (error - expected).square()
    spread = torch.where(m > 1, m / (m - 1).clamp(min=1) * squares, 0.0).sum(0)
    several = int((members[stratum] > 1).sum())
    freedom = several - int((members > 1).sum())
    if freedom == 0:
        return Interval(mean, torch.full_like(mean, torch.inf), torch.full_like(mean, torch.inf))
    # Strata with a single unit are given the average variance of the others' units.
    spread = spread * (len(counts) / several)
    stderr = spread.sqrt() / whole.abs()
    freedom = max(1.0, min(freedom, max_freedom))
    return Interval(mean, stderr, stderr * float(student_t.ppf(0.975, freedom)))
