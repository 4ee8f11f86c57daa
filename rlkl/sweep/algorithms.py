"""rlkl's own trainers as the recipes of a sweep: their commands, and what they call its settings.

A sweep has one name for one thing, whatever trains: ``kl_coef`` and ``response_length``, as PPO
calls them. TRL's trainers call them ``beta`` and ``max_completion_length``, and so do the settings
that their cells are run with; a spec may use either name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlkl.sweep.spec import ALGORITHM


@dataclass(frozen=True)
class Algorithm:
    """What a sweep must know of a command such as ``rlkl rloo``."""

    own_names: Mapping[str, str] = field(default_factory=dict)
    """What it calls a setting that a sweep calls otherwise."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Settings of other algorithms that it has not, by what it does."""


_TRL = {"kl_coef": "beta", "response_length": "max_completion_length"}
_EXACT = {"kl_estimator": "rb", "kl_placement": "both"}
ALGORITHMS = {"ppo": Algorithm(), "rloo": Algorithm(_TRL, _EXACT), "grpo": Algorithm(_TRL, _EXACT)}
"""By the name of the command."""
CHOICES = "ppo, rloo or grpo"


def command_of(algorithm: str) -> list[str]:
    """Its command, as words for Python."""
    return ["-m", "rlkl", algorithm]


def in_own_names(algorithm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's settings as its command takes them.

    >>> in_own_names("rloo", {"algorithm": "rloo", "kl_coef": 0.3, "seed": 1})
    {'beta': 0.3, 'seed': 1}
    """
    names = ALGORITHMS[algorithm].own_names
    return {names.get(k, k): v for k, v in settings.items() if k != ALGORITHM}


def in_sweep_names(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings that a user wrote by either name, by the sweep's.

    Raises:
        ValueError: both names of one setting.

    >>> in_sweep_names({"beta": 0.3, "seed": 1}, "config")
    {'kl_coef': 0.3, 'seed': 1}
    """
    for name, own in _TRL.items():
        if name in settings and own in settings:
            raise ValueError(f"{where} has {name} and {own}, which are one setting: leave one out")
    names = {own: name for name, own in _TRL.items()}
    return {names.get(k, k): v for k, v in settings.items()}
