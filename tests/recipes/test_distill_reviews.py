"""The recipe of seven losses: two of them for two steps, its verdicts, and nonsense."""

import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from scipy.stats import ttest_1samp
from torch import Tensor

from rlkl.trainers import DistillConfig

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """The script as Python runs it: its folder comes first where modules are looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield importlib.import_module("distill_reviews")


@pytest.fixture
def students(recipe) -> ModuleType:
    return sys.modules["distill_students"]


@pytest.fixture
def findings(recipe) -> ModuleType:
    return sys.modules["distill_report"]


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
    # Runs with other settings do not mix with these; where they are logged is no such setting.
    for name, was, now in (
        ("max_steps", 2, 3),
        ("gradient_accumulation_steps", 1, 2),
        ("lr_scheduler_type", "linear", "constant"),
        ("weight_decay", 0.0, 0.1),
    ):
        monkeypatch.setattr(sys, "argv", arguments(tmp_path / "out", **{name: now}))
        with pytest.raises(SystemExit, match="2"):
            recipe.main()
        assert f"holds runs with {name}={was}, not {now}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", arguments(tmp_path / "out", run_name="x", threads=2))
    recipe.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": "kl"}, "losses: 'kl' is unknown"),
        ({"nonsense": 1}, "nonsense"),
        ({"teacher": "/no/such/folder"}, "no such model folder"),
        ({"los": "akl"}, "--los"),
        ({"corpus_size": 0}, "corpus_size is 0; give at least 1"),
        ({"num_eval": 0}, "num_eval is 0; give at least 2"),
        ({"student_width": 95}, "student_width is 95; give a multiple of the teacher's"),
        ({"student_layers": 0}, "student_layers is 0; give at least 1"),
        ({"threads": 0}, "threads is 0; give at least 1"),
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


def runs_of(values: list[float], sums: Tensor) -> dict[int, dict[str, Any]]:
    """Records of one run a seed, with a metric's value and its sums and tokens per prompt."""
    return {
        seed: {"metrics": {"x": value}, "per_prompt": {"x": sums[seed].tolist()}}
        for seed, value in enumerate(values)
    }


def test_the_interval_over_seeds_is_that_of_paired_differences(findings):
    sums = torch.stack([torch.randn(3, 20), torch.ones(3, 20)], -1)
    found = findings.difference(runs_of([3.0, 4.0, 5.0], sums), runs_of([2.0, 2.0, 2.0], sums), "x")
    assert found["mean"] == 2
    half = 4.302653 / math.sqrt(3)  # t(0.975; 2), s = 1
    assert found["ci95_seeds"] == pytest.approx(half, rel=1e-5)
    assert found["ci95_prompts"] == 0  # the same text at the same distance


def test_the_interval_over_prompts_is_students_where_all_have_as_many_tokens(findings):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 30, generator=generator)  # [seeds, prompts] each
    differences = (ours - theirs).mean(0) / 4
    interval = ttest_1samp(differences.numpy(), 0.0).confidence_interval(0.95)
    tokens = torch.full((2, 30), 4.0)
    half = findings.interval_over_prompts(
        torch.stack([ours, tokens], -1), torch.stack([theirs, tokens], -1)
    )
    assert half == pytest.approx((interval.high - interval.low) / 2, rel=1e-5)


def test_the_interval_over_prompts_covers_the_difference_where_lengths_vary(findings):
    """Ratios of sums: 200 sets of 40 prompts with lengths that go with the values."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    lengths = torch.arange(1.0, 11.0)
    truth = float((2.0 - 1.0) * lengths.square().mean() / lengths.mean())
    for _ in range(200):
        own = lengths[torch.randint(10, (2, 1, 40), generator=generator)]
        noise = torch.randn(2, 1, 40, generator=generator)
        sums = torch.tensor([2.0, 1.0])[:, None, None] * own.square() + noise
        ratios = sums.sum(-1) / own.sum(-1)
        half = findings.interval_over_prompts(*torch.stack([sums, own], -1))
        covered += abs(float(ratios[0, 0] - ratios[1, 0]) - truth) <= half
    # Binomial(200, 0.95): four standard errors are 12; a ratio's interval is a little short.
    assert 176 <= covered <= 199


def test_verdicts_need_both_intervals_and_more_than_one_seed(findings):
    assert findings.verdict(-1.0, 0.5, 0.5) == "AKL better"
    assert findings.verdict(1.0, 0.5, 0.5) == "AKL worse"
    assert findings.verdict(-1.0, 0.5, 1.5) == findings.verdict(1.0, 1.5, 0.5) == "not told apart"
    assert findings.verdict(-1.0, None, 0.5) == "one seed says nothing of others"


def test_one_seed_has_no_errors_and_its_summary_is_json(findings, tmp_path):
    records = [
        {
            "loss": loss,
            "seed": 0,
            "seconds": 2.0,
            "cpu_seconds": 1.0,
            "metrics": dict.fromkeys(findings.COLUMNS, 0.5),
            "per_prompt": {key: [[1.0, 2.0], [2.0, 4.0]] for key in findings.DIVERGENCE_COLUMNS},
            "course": [{"step": 0, "fkl": 1.0, "rkl": 1.0}],
        }
        for loss in ("akl", "fkl")
    ]
    console = Console(record=True, width=200)
    findings.report(tmp_path, records, console)
    assert "one seed" in console.export_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["losses"]["akl"]["held_out/divergence/fkl_se"] is None
    assert summary["akl_minus"]["fkl"]["own/divergence/rkl"]["ci95_seeds"] is None


def test_the_student_begins_with_the_teachers_embeddings_in_its_width(students, make_lm):
    teacher, student = make_lm(), make_lm(n_embd=8, seed=1)
    students.begin_with_embeddings(student, teacher)
    wide = teacher.get_input_embeddings().weight.detach()
    narrow = student.get_input_embeddings().weight.detach()
    # Of all matrices of rank 8 the one whose products are nearest to the teacher's.
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    best = (vectors[:, -8:] * values[-8:]) @ vectors[:, -8:].T
    torch.testing.assert_close(narrow @ narrow.T, best, rtol=1e-4, atol=1e-4)


@pytest.fixture
def warm_up(students, make_lm, tokenizer, tmp_path) -> Callable[[str], dict[str, Tensor]]:
    """Warms a student up for six steps, in a folder of the name given: its weights."""
    completions = ["good film", "dull plot was awful", "so great", "superb acting in it"] * 3
    data = Dataset.from_dict({"prompt": ["the film"] * 12, "completion": completions})
    task = students.StudentArguments(
        student_width=8, student_layers=1, warm_up_steps=6, warm_up_batch_size=5
    )
    teacher = make_lm(
        resid_pdrop=0.1
    )  # dropout draws random numbers, which a resume must go on with
    args = DistillConfig(output_dir=str(tmp_path), response_length=4, bf16=False)

    def weights(name: str) -> dict[str, Tensor]:
        where = (tmp_path / name, 0, teacher, tokenizer, data, task, args, Console(quiet=True))
        return students.warmed_up(*where).state_dict()

    return weights


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_warm_up_that_was_killed_goes_on_to_the_same_student(
    students, warm_up, tmp_path, monkeypatch
):
    monkeypatch.setattr(students, "SAVE_STEPS", 2)
    loss, steps = students.CrossEntropyTrainer.compute_loss, []

    def killed_once_in_step_4(trainer: Any, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(trainer.state.global_step + 1)
        if len(steps) == 4:
            raise RuntimeError("killed")
        return loss(trainer, *args, **kwargs)

    monkeypatch.setattr(students.CrossEntropyTrainer, "compute_loss", killed_once_in_step_4)
    with pytest.raises(RuntimeError, match="killed"):
        warm_up("killed")
    work = tmp_path / "killed.warm-up"
    assert checkpoints(work) == ["checkpoint-2"]
    (work / "checkpoint-4").mkdir()  # as if the kill had come while this one was written
    resumed = warm_up("killed")
    assert steps == [1, 2, 3, 4, 3, 4, 5, 6]
    torch.testing.assert_close(resumed, warm_up("whole"), rtol=0, atol=0)
    assert not work.exists()


def test_ctrl_c_in_the_warm_up_is_one_line_and_keeps_its_steps(
    recipe, students, tmp_path, monkeypatch, capsys
):
    loss = students.CrossEntropyTrainer.compute_loss

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(*args, **kwargs)

    monkeypatch.setattr(students.CrossEntropyTrainer, "compute_loss", interrupted)
    monkeypatch.setattr(sys, "argv", arguments(tmp_path / "out"))
    with pytest.raises(SystemExit, match="130"):
        recipe.main()
    assert "the same command goes on" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.jsonl").is_file()
    assert checkpoints(tmp_path / "out" / "students" / "seed0.warm-up") == ["checkpoint-1"]


def test_the_recipes_name_only_settings_that_exist(recipe, tmp_path):
    parts = (recipe.ReviewsArguments, recipe.StudentArguments, DistillConfig)
    known = {name for part in parts for name in part.__dataclass_fields__}
    settings = yaml.safe_load((RECIPES / "distill_reviews.yaml").read_text())
    assert set(settings) <= known
    assert len(settings["losses"]) == 7
    assert len(settings["seeds"]) == 3
