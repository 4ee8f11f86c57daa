"""Options are written out, and a file of settings says what its settings have room for."""

import ast
import sys
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path

import pytest
import yaml

from rlkl.cli.errors import refusing_bad_input
from rlkl.cli.settings import SettingsParser
from rlkl.trainers import DistillConfig

ROOT = Path(__file__).parents[2]


class Strategy(StrEnum):
    """Of saving."""

    NO = "no"
    STEPS = "steps"


@dataclass
class Settings:
    """Some settings."""

    losses: list[str] = field(default_factory=list, metadata={"help": "Several."})
    steps: int = field(default=1, metadata={"help": "How many."})
    rate: float = field(default=0.1, metadata={"help": "How fast."})
    target: float | None = field(default=None, metadata={"help": "Where to."})
    bf16: bool | None = field(default=None, metadata={"help": "How exactly."})
    strategy: Strategy | str = field(default="steps", metadata={"help": "When."})
    folder: str = field(default="runs", metadata={"help": "Where."})
    options: dict | str | None = field(default=None, metadata={"help": "What else."})


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", "FILE: unknown field 'stepps'; did you mean steps?"),
        ("3: 4", "FILE: unknown field 3"),
        ("steps: 2.5", "FILE: steps is 2.5; a whole number is needed"),
        ("steps: true", "FILE: steps is true; a whole number is needed"),
        ("steps: 2024-01-01", "FILE: steps is datetime.date(2024, 1, 1); a whole number"),
        ("steps: few", "invalid int value: 'few'"),
        ("rate: null", "FILE: rate is null; a number is needed"),
        ("rate: [1, 2]", "FILE: rate is [1, 2]; a number is needed"),
        ("rate: {a: 1}", "FILE: rate is {'a': 1}; a number is needed"),
        ("rate: yes", "FILE: rate is true; a number is needed"),
        ("target: [1]", "FILE: target is [1]; a number is needed"),
        ("bf16: 3", "FILE: bf16 is 3; true or false is needed"),
        ("strategy: no", "FILE: strategy is false; text is needed; put it in quotes"),
        ("strategy: 3", "FILE: strategy is 3; text is needed; put it in quotes"),
        ("folder: 7", "FILE: folder is 7; text is needed; put it in quotes"),
        ("folder: null", "FILE: folder is null; text is needed"),
        ("losses: {a: 1}", "FILE: losses is {'a': 1}; a list is needed"),
        ("losses: [akl, 1]", "FILE: losses[1] is 1; text is needed; put it in quotes"),
        ("options: 3", "FILE: options is 3; text or a mapping is needed"),
        ("steps: 1\nsteps: 2", "steps stands twice in one mapping"),
        ("steps: 1\n  rate: [", 'in "FILE", line 2'),
        ("", "FILE holds no settings: give lines of the form name: value"),
        ("- steps", "FILE holds no settings"),
        ("steps", "FILE holds no settings"),
        ("env: 3", "`env` field should be a dict"),
    ],
)
def test_a_bad_file_of_settings_is_one_line(text, message, tmp_path, monkeypatch, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, "--config", str(file))
    error = capsys.readouterr().err
    assert message.replace("FILE", str(file)) in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_what_fits_a_file_of_settings_is_taken(tmp_path, monkeypatch):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "rate: 1e-3\nsteps: 3\ntarget: null\nbf16: no\nstrategy: 'no'\nlosses: [akl, fkl]\n"
        "options: {a: 1}\nenv: {RLKL_OF_A_TEST: 'a'}\n"
    )
    monkeypatch.setenv("RLKL_OF_A_TEST", "b")  # and back
    settings = parse(monkeypatch, f"--config={file}", "--steps", "4")
    assert (settings.rate, settings.steps, settings.target) == (0.001, 4, None)
    assert (settings.bf16, settings.strategy, settings.options) == (False, "no", {"a": 1})
    file.write_text("rate: 2\nlosses: akl\n")
    settings = parse(monkeypatch, "--config", str(file))
    assert (settings.rate, settings.losses) == (2, "akl")


def test_an_unknown_option_is_named_with_the_nearest(monkeypatch, capsys):
    for words, said in (
        (["--stepz", "3"], "'--stepz 3'; did you mean steps?"),
        (["--stepz=3"], "'--stepz=3'; did you mean steps?"),
        (["--qqqq", "3"], "'--qqqq 3': --help lists them all"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(monkeypatch, *words)
        assert f"there is no setting {said}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["distill_reviews", "distill_instruct"])
def test_the_settings_of_transformers_are_taken_from_shipped_files(name, tmp_path, monkeypatch):
    """Their types, unions with enumerations and all, leave room for what these files say."""
    monkeypatch.setattr(sys, "argv", ["rlkl"])
    given = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    own = {f.name for f in fields(DistillConfig)}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in given.items() if k in own}))
    (settings,) = SettingsParser((DistillConfig,)).parse(str(file))
    assert settings.learning_rate == float(given["learning_rate"])


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
