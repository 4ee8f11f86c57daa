"""`rlkl ppo`, `rlkl rloo`, `rlkl grpo`: a language model towards a reward, held near its reference.

Each trains what recipes/sentiment_ppo.py trains, by the same code (`rlkl.cli.sentiment`).
"""

import inspect
import sys
from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings as --name value, after those of --config FILE; --help lists them all.",
        show_default=False,
    ),
]


def ppo(settings: Settings = None) -> None:
    """Trains a language model towards a reward by PPO, and measures reward and KL before and after.

    Without --config it teaches the embedded review LM to write positive reviews, on a CPU.
    A run that was stopped goes on when the same command is given again.

    Example: rlkl ppo --kl_coef 0.5 --seed 1 --output_dir runs/mine
    """
    _train("PPO", ppo.__doc__, settings)


def rloo(settings: Settings = None) -> None:
    """Trains a language model towards a reward by TRL's RLOO with the exact KL, and measures it.

    Without --config it teaches the embedded review LM to write positive reviews, on a CPU.
    A run that was stopped goes on when the same command is given again.

    Example: rlkl rloo --beta 0.5 --seed 1 --output_dir runs/mine
    """
    _train("RLOO", rloo.__doc__, settings)


def grpo(settings: Settings = None) -> None:
    """Trains a language model towards a reward by TRL's GRPO with the exact KL, and measures it.

    Without --config it teaches the embedded review LM to write positive reviews, on a CPU.
    A run that was stopped goes on when the same command is given again.

    Example: rlkl grpo --beta 0.5 --seed 1 --output_dir runs/mine
    """
    _train("GRPO", grpo.__doc__, settings)


def _train(name: str, description: str | None, settings: list[str] | None) -> None:
    """Runs one of the algorithms of `rlkl.cli.sentiment` with the settings that were given."""
    sys.argv = [f"rlkl {name.lower()}", *(settings or [])]
    from rlkl.cli.sentiment.algorithms import ALGORITHMS
    from rlkl.cli.sentiment.run import run

    algorithm = ALGORITHMS[name]
    run(algorithm, inspect.cleandoc(description or ""), algorithm.defaults)
