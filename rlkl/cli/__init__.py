"""The `rlkl` command (`rlkl.cli.main`, one module per subcommand), and what recipes share with it.

Importing this package is quick: a command imports what it computes with when it runs, and
`SettingsParser`, which needs trl, is loaded when it is asked for.
"""

import logging
from typing import TYPE_CHECKING, Any

from rlkl.cli.errors import fail, refusing_bad_input

if TYPE_CHECKING:
    from rlkl.cli.settings import SettingsParser

# PEFT imports it, whatever is trained; it then misses a kernel for 4 bits on CPUs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["SettingsParser", "fail", "refusing_bad_input"]


def __getattr__(name: str) -> Any:
    if name == "SettingsParser":
        from rlkl.cli.settings import SettingsParser

        return SettingsParser
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
