"""`rlkl distill` as its users run it: local models, instruction data, and being wrong."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlkl.cli.main import main
from tests.offline_wandb import history, offline_records

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def folders(
    tmp_path: Path, make_lm: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> Path:
    """Tiny student and teacher, SelfInst and Vicuna files, as a user would have them."""
    tokenizer = make_tokenizer(pad_is_eos=False)
    for seed, name in enumerate(("teacher", "student")):
        make_lm(vocab_size=len(tokenizer), seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    files = {
        "train.jsonl": [{"prompt": "the film is", "response": "very good"}] * 8,
        "selfinst.jsonl": [
            {"instruction": "the plot", "instances": [{"input": "", "output": "dull"}]}
        ]
        * 3,
        "vicuna.jsonl": [{"question_id": i, "turns": ["the end"]} for i in range(3)],
        "answers.jsonl": [{"question_id": 1, "choices": [{"turns": ["so good"]}]}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> int:
    options = {
        "config": str(RECIPES / "distill_instruct.yaml"),
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "teacher_dtype": "float32",
        "train_data": folder / "train.jsonl",
        "eval_data": f"{folder / 'selfinst.jsonl'} {folder / 'vicuna.jsonl'}",
        "eval_references": folder / "answers.jsonl",
        "output_dir": folder / "out",
        "max_prompt_length": 20,
        "response_length": 5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "bf16": False,
        "report_to": "none",
    }
    words = ["rlkl", "distill"]
    for name, value in (options | changes).items():
        words += [f"--{name}", *str(value).split()]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("COLUMNS", "120")
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_instruction_recipe_runs_from_prompts_to_rouge(folders, monkeypatch, capsys):
    assert run(monkeypatch, folders) == 0
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert summary["selfinst"]["rouge_l_n"] == 3
    assert summary["vicuna"]["rouge_l_n"] == 1  # prompts without a reference are only sampled
    assert summary["vicuna"]["own/divergence/rkl"] > 0
    assert (folders / "out" / "student" / "model.safetensors").is_file()
    samples = (folders / "out" / "samples_vicuna.jsonl").read_text().splitlines()
    assert len(samples) == 3
    assert "ROUGE-L" in capsys.readouterr().out


# wandb's own code under Python 3.11 and pydantic 2
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_gets_the_final_metrics_in_the_run_of_the_training(folders, monkeypatch):
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(folders / "wandb-home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    assert run(monkeypatch, folders, report_to="wandb", logging_steps=1) == 0
    rows = history(offline_records(folders / "out"))
    assert any("train/divergence/akl" in row for row in rows)
    (final,) = [row for row in rows if "final/selfinst/rouge_l" in row]
    summary = json.loads((folders / "out" / "summary.json").read_text())
    for name, metrics in summary.items():
        for key, value in metrics.items():
            assert final[f"final/{name}/{key}"] == pytest.approx(value)


def test_a_stopped_run_goes_on_and_refuses_other_settings(folders, monkeypatch, capsys):
    from rlkl.trainers import StopOnInterrupt

    def at_once(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = True

    with monkeypatch.context() as stopped:
        stopped.setattr(StopOnInterrupt, "on_step_end", at_once)
        assert run(stopped, folders) == 130
    assert "stopped after step 1 of 2" in capsys.readouterr().out
    assert run(monkeypatch, folders, learning_rate=1e-3) == 2
    assert "unfinished run with learning_rate=5e-05, not 0.001" in capsys.readouterr().err
    assert run(monkeypatch, folders) == 0
    assert "going on from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "none.jsonl"}, "no such file: none.jsonl"),
        ({"teacher_dtype": "int8"}, "teacher_dtype is 'int8'; use float32"),
        ({"loss": "kl"}, "divergence 'kl' is unknown"),
        ({"teacher_model_name_or_path": "/no/such"}, "no such model folder: /no/such"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(changes, message, folders, monkeypatch, capsys):
    assert run(monkeypatch, folders, **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_judge_that_does_not_answer_is_named(folders, monkeypatch, capsys):
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *a: 0.0)
    assert run(monkeypatch, folders, judge_url="http://127.0.0.1:9/v1") == 2
    assert "no judge answers at http://127.0.0.1:9/v1" in capsys.readouterr().err


def test_help_has_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlkl", "distill", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    out = capsys.readouterr().out
    assert "rlkl distill --config recipes/distill_instruct.yaml" in out
    assert "--teacher_model_name_or_path" in out


def test_the_recipe_names_only_settings_that_exist():
    from trl import ModelConfig

    from rlkl.cli.distill_run import DistillArguments
    from rlkl.trainers import DistillConfig

    classes = (DistillArguments, DistillConfig, ModelConfig)
    known = {name for c in classes for name in c.__dataclass_fields__}
    assert set(yaml.safe_load((RECIPES / "distill_instruct.yaml").read_text())) <= known
