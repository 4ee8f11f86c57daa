"""`pretrain_review_lm.py`: bad input is one line, before any work."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "pretrain_review_lm.py"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"--threads": "0"}, "threads is 0; give at least 1"),
        ({"--train_data": "none.jsonl"}, "no such file: none.jsonl"),
        ({"--output_dir": "reviews.jsonl"}, "cannot use 'reviews.jsonl': File exists"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("reviews.jsonl").write_text(json.dumps({"text": "a film"}) + "\n")
    options = {"--train_data": "reviews.jsonl", "--eval_data": "reviews.jsonl"}
    options |= {"--output_dir": "out"} | changes
    words = [word for option in options.items() for word in option]
    monkeypatch.setattr(sys, "argv", ["pretrain_review_lm.py", *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress of reading
    assert error.startswith("error: ")
    assert complaint in error
    assert not Path("out").exists()
