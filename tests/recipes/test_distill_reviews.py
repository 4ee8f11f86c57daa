"""The recipe of seven losses: two of them for two steps, its verdicts, and nonsense."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rlkl.trainers import DistillConfig

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distill_reviews", RECIPES / "distill_reviews.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill_reviews"] = module
    spec.loader.exec_module(module)
    return module


def arguments(folder: Path, **changes: Any) -> list[str]:
    options = {
        "losses": "akl fkl",
        "seeds": "0 1",
        "student_width": 8,
        "student_layers": 1,
        "corpus_size": 16,
        "num_eval": 8,
        "warm_up_steps": 2,
        "max_steps": 2,
        "eval_steps": 1,
        "logging_steps": 1,
        "response_length": 4,
        "per_device_train_batch_size": 4,
        "output_dir": folder,
        "bf16": False,
    }
    words = ["distill_reviews.py"]
    for name, value in (options | changes).items():
        words += [f"--{name}", *str(value).split()]
    return words


def test_two_losses_of_two_seeds_end_in_table_plot_and_records(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", arguments(tmp_path / "out"))
    recipe.main()
    out = capsys.readouterr().out
    assert "AKL minus FKL" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["losses"]) == {"akl", "fkl"}
    assert (tmp_path / "out" / "held_out.png").stat().st_size > 10_000
    records = {
        path.parent.name: json.loads(path.read_text())
        for path in (tmp_path / "out" / "runs").glob("*/record.json")
    }
    assert set(records) == {"akl-seed0", "akl-seed1", "fkl-seed0", "fkl-seed1"}
    for seed in (0, 1):  # the same student before, the same batches after
        starts = [records[f"{loss}-seed{seed}"]["course"][0] for loss in ("akl", "fkl")]
        assert starts[0] == starts[1]
    assert [c["step"] for c in records["akl-seed0"]["course"]] == [0, 1, 2]
    # What is finished is kept: the same command only reports.
    monkeypatch.setattr(recipe, "run", None)
    recipe.main()
    assert "AKL minus FKL" in capsys.readouterr().out
    # Runs with other settings do not mix with these.
    monkeypatch.setattr(sys, "argv", arguments(tmp_path / "out", max_steps=3))
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    assert "holds runs with max_steps=2, not 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": "kl"}, "losses: 'kl' is unknown"),
        ({"nonsense": 1}, "nonsense"),
        ({"teacher": "/no/such/folder"}, "no such model folder"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(
    recipe, changes, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", arguments(tmp_path / "out", **changes))
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_interval_of_paired_differences_is_students(recipe):
    mean, half = recipe.paired_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)  # t(0.975; 2), s = 1
    assert recipe.paired_interval([1.0])[1] == math.inf
    assert recipe.verdict(-1.0, 0.5) == "AKL better"
    assert recipe.verdict(1.0, 0.5) == "AKL worse"
    assert recipe.verdict(-1.0, math.inf) == "not told apart"


def test_the_recipes_name_only_settings_that_exist(recipe, tmp_path):
    known = set(DistillConfig.__dataclass_fields__) | set(
        recipe.ReviewsArguments.__dataclass_fields__
    )
    settings = yaml.safe_load((RECIPES / "distill_reviews.yaml").read_text())
    assert set(settings) <= known
    assert len(settings["losses"]) == 7
    assert len(settings["seeds"]) == 3
