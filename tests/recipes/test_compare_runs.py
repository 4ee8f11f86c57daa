"""The rows of `compare_runs.py`: means over the last steps with the error of independent steps."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "compare_runs.py"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Two early steps that must not count, then four alike, an evaluation's record between."""
    last = {"objective/scores": 2.0, "objective/scores_se": 0.5, "kl/rb": 3.0}
    records = [{"objective/scores": 9.0, "objective/scores_se": 9.0, "kl/rb": 9.0}] * 2
    records += [last, last, {"train_loss": 1.0}, last, last]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    summary = {"seed": 3, "gap_closed": 0.5, "kl_rb": 2.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "settings.json").write_text(json.dumps({"bf16": False}))
    return tmp_path


def test_the_error_of_a_mean_of_n_steps_is_that_of_one_over_the_root_of_n(
    run_folder, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(run_folder), "--steps", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    row = capsys.readouterr().out.splitlines()[-1]
    assert "| 3 | float32 | 2.00 ± 0.49 at 3.00 nats | 50% at 2.50 |" in row  # 1.96 · 0.5 / √4


def test_a_folder_without_a_finished_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert "no finished run" in capsys.readouterr().err
