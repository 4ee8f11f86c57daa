"""Options are written out: an abbreviation is refused, whatever it could stand for."""

import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlkl.cli.errors import refusing_bad_input
from rlkl.cli.settings import SettingsParser

ROOT = Path(__file__).parents[2]


@dataclass
class Settings:
    """Some settings."""

    losses: list[str] = field(default_factory=list, metadata={"help": "Several."})
    steps: int = field(default=1, metadata={"help": "How many."})


def parse(monkeypatch: pytest.MonkeyPatch, *words: str) -> Settings:
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    with refusing_bad_input():
        (settings,) = SettingsParser((Settings,)).parse()
    return settings


def test_options_are_taken_by_their_whole_name(monkeypatch):
    settings = parse(monkeypatch, "--losses", "akl", "fkl", "--steps=3")
    assert (settings.losses, settings.steps) == (["akl", "fkl"], 3)


@pytest.mark.parametrize("words", [["--loss", "akl"], ["--step", "3"], ["--step=3"]])
def test_abbreviated_options_are_refused_in_one_line(words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, *words)
    error = capsys.readouterr().err
    assert words[0] in error
    assert error.count("\n") == 1


def test_no_script_takes_abbreviated_options():
    scripts = [*(ROOT / "recipes").rglob("*.py"), *(ROOT / "reward_models").rglob("*.py")]
    parsers = [
        (path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in scripts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser"
    ]
    assert len(parsers) > 5
    assert [name for name, options in parsers if options.get("allow_abbrev") != "False"] == []
