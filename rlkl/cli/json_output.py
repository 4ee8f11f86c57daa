"""`--json PATH|-`: what a command found, for programs."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console


def write_json(record: Any, target: str) -> None:
    """Writes `record` to a file, or to standard output if `target` is ``-``.

    Numbers that JSON does not have (nan, inf) are written as null.

    >>> write_json({"kl": math.inf, "n": [1]}, "-")
    {"kl": null, "n": [1]}
    """
    text = json.dumps(_finite(record))
    if target == "-":
        print(text, file=sys.stdout)
    else:
        Path(target).write_text(text + "\n")


@contextmanager
def console_beside(target: str | None) -> Iterator[Console]:
    """The console of a command's work; where the JSON goes to standard output, that is left to it.

    What libraries print goes to standard error then, too.
    """
    if target != "-":
        yield Console()
        return
    with redirect_stdout(sys.stderr):
        yield Console(stderr=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
