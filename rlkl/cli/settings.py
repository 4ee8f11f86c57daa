"""Settings from YAML and the command line, as the training commands and recipes take them."""

import sys
from typing import Any, NoReturn

from trl import TrlParser

from rlkl.cli.errors import fail


class SettingsParser(TrlParser):
    """TrlParser whose complaints are one line: dataclass fields, ``--config FILE``, command line
    over YAML.
    """

    def error(self, message: str) -> NoReturn:
        """Says what is wrong without the several hundred lines of usage; exit code 2."""
        fail(f"{message} (see --help)")

    def parse(self, default_config: str | None = None) -> tuple[Any, ...]:
        """Parses ``sys.argv``; without ``--config`` the settings of `default_config` hold.

        Raises:
            ValueError: an unknown key in the YAML file, or an unknown option.
            FileNotFoundError: a config file that is not there.
        """
        given = [part for word in sys.argv[1:] for part in _split_option(word)]
        if "--config" not in given and default_config is not None:
            given = ["--config", default_config, *given]
        if given[-1:] == ["--config"]:
            self.error("--config needs a file")
        return self.parse_args_and_config(given)


def _split_option(word: str) -> list[str]:
    """``--config=FILE`` as two words, which is how TrlParser looks for it."""
    return word.split("=", 1) if word.startswith("--config=") else [word]
