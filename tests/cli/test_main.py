"""The `rlkl` command itself: help, version, nonsense, and a quick start."""

import subprocess
import sys

import pytest

import rlkl
from rlkl.cli.main import main


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlkl", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_help_and_no_arguments_list_the_commands(monkeypatch, capsys):
    for words in ((), ("--help",)):
        assert run(monkeypatch, *words) == 0
        assert "Usage" in capsys.readouterr().out


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"rlkl {rlkl.__version__}\n"


def test_python_runs_the_package_as_the_command():
    command = [sys.executable, "-m", "rlkl", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"rlkl {rlkl.__version__}\n"


@pytest.mark.parametrize("words", [["nonsense"], ["--nonsense"]])
def test_nonsense_is_one_line_on_standard_error_and_exit_code_2(monkeypatch, capsys, words):
    assert run(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "nonsense" in err
    assert err.count("\n") == 1


def test_the_command_line_is_read_without_loading_what_commands_compute_with():
    heavy = "{'torch', 'transformers', 'trl', 'plotly', 'matplotlib'}"
    code = f"import sys, rlkl.cli.main; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_recipes_find_the_settings_parser_here():
    from rlkl.cli import SettingsParser, settings

    assert SettingsParser is settings.SettingsParser
    with pytest.raises(ImportError, match="SettingsReader"):
        from rlkl.cli import SettingsReader  # noqa: F401
