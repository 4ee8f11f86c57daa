"""How strongly the KL is penalised: a fixed coefficient β, or one that steers the KL to a target.

Both kinds have a `value` (β, reward units per nat), are told the measured KL by `update`, and keep
their state in the checkpoint by `state_dict` and `load_state_dict`, so that a resumed run goes on
with the β it had.
"""

import math
from abc import ABC, abstractmethod

_MAX_ERROR = 0.2  # the clip of Ziegler et al. (2019)


class KLCoefficient(ABC):
    """β with its update rule: `FixedKLCoefficient` or `AdaptiveKLCoefficient`."""

    value: float

    @abstractmethod
    def update(self, kl: float, n: int) -> None:
        """Takes note of a batch: `kl`, mean nats per response, measured on `n` responses."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold: `{"value": β}`."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores β from `state_dict()`."""
        self.value = _checked_value("state['value']", state["value"])


class FixedKLCoefficient(KLCoefficient):
    """β that does not change.

    Raises:
        ValueError: `value` is negative or not finite.

    Example:
        >>> FixedKLCoefficient(0.05).value
        0.05
    """

    def __init__(self, value: float):
        """Sets β to `value` ≥ 0; 0 penalises nothing, and the KL is still measured."""
        self.value = _checked_value("value", value)

    def update(self, kl: float, n: int) -> None:
        """Leaves β as it is."""


class AdaptiveKLCoefficient(KLCoefficient):
    """β that is raised while the KL is above its target, and lowered while it is below.

        e = clip(KL / target - 1, -0.2, 0.2)
        β ← β · (1 + e · n / horizon)

    Reference:
        Fine-Tuning Language Models from Human Preferences (Ziegler et al., 2019), section 2.2,
        https://arxiv.org/abs/1909.08593. The paper has one gain K_β where its code has n / horizon.

    Raises:
        ValueError: `initial`, `target` or `horizon` is not positive and finite.

    Example:
        >>> coefficient = AdaptiveKLCoefficient(initial=0.1, target=6.0, horizon=10_000)
        >>> coefficient.update(kl=9.0, n=1000)  # half as much again as wanted: e is clipped to 0.2
        >>> round(coefficient.value, 6)
        0.102
    """

    def __init__(self, initial: float, target: float, horizon: int):
        """Starts at `initial`.

        Args:
            initial: first β.
            target: the KL to hold, nats per response.
            horizon: responses over which a clipped error moves β by 20%.
        """
        for name, given in (("initial", initial), ("target", target), ("horizon", horizon)):
            if not (math.isfinite(given) and given > 0):
                raise ValueError(
                    f"{name} is {given}; an adaptive KL coefficient needs {name} > 0, as it is "
                    "multiplied (for no penalty or a constant one use FixedKLCoefficient)"
                )
        self.value = float(initial)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Moves β by the error of a batch: `kl`, mean nats per response, of `n` responses.

        Raises:
            ValueError: `kl` is not finite, or `n` is so large that β could reach 0.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl is {kl}; measure it again or skip this update: β would be lost")
        if _MAX_ERROR * n >= self.horizon:
            raise ValueError(
                f"n is {n} with a horizon of {self.horizon}: one update could take β to 0 or "
                f"below; use a horizon well above {_MAX_ERROR * n:g} (0.2 times the batch)"
            )
        error = min(max(kl / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
        self.value *= 1 + error * n / self.horizon


def _checked_value(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"{name} is {value}; a KL coefficient must be finite and >= 0 (a negative one rewards "
            "moving away from the reference; use 0 for no penalty)"
        )
    return float(value)
