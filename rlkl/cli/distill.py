"""`rlkl distill`: a student towards its teacher by any divergence, measured on held-out prompts."""

import sys
from typing import Annotated

import typer


def distill(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings as --name value, after those of --config FILE; --help lists them all.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Trains a student to have its teacher's next-token distributions, and measures it.

    Off-policy, teacher-generated or on-policy; prompt and completion, instructions or plain text.
    Example: rlkl distill --config recipes/distill_instruct.yaml --loss akl --seed 1
    """
    sys.argv = ["rlkl distill", *(settings or [])]
    from rlkl.cli.distill_run import run

    run()
