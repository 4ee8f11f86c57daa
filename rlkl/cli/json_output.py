"""`--json PATH|-`: what a command found, for programs."""

import json
import math
import sys
from pathlib import Path
from typing import Any


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
