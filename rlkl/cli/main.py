"""The `rlkl` entry point: one line per command; options and heavy imports are the commands' own."""

import sys
from typing import Annotated

import typer

import rlkl
from rlkl.cli.audit import audit
from rlkl.cli.distill import distill
from rlkl.cli.errors import fail
from rlkl.cli.kl import kl
from rlkl.cli.sweep import sweep_app
from rlkl.cli.train import grpo, ppo, rloo

app = typer.Typer(
    help="The KL of a language model from its reference: audited, estimated, traded for reward.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("audit")(audit)
app.command("kl")(kl)
# Their settings are a training configuration's, --help included: they are read from what follows.
for _name, _command in {"ppo": ppo, "rloo": rloo, "grpo": grpo, "distill": distill}.items():
    app.command(
        _name,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )(_command)
app.add_typer(sweep_app, name="sweep")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rlkl {rlkl.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def main() -> None:
    """Runs the command line; a usage error is one line and exit code 2, Ctrl-C exits with 130."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as error:
        fail(f"{error.format_message()} (see --help)")


if __name__ == "__main__":
    main()
