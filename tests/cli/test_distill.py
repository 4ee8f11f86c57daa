"""`rlkl distill` as its users run it: local models, instruction data, and being wrong."""

import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlkl.cli.main import main
from tests.offline_wandb import history, offline_records

RECIPES = Path(__file__).parents[2] / "recipes"
REAL = Path(__file__).parents[3] / "shared" / "data" / "instruct"
"""The data sets themselves, where they lie beside the project."""


@pytest.fixture
def folders(
    tmp_path: Path, make_lm: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> Path:
    """Tiny student and teacher, SelfInst and Vicuna files, as a user would have them."""
    tokenizer = make_tokenizer(pad_is_eos=False)
    for seed, name in enumerate(("teacher", "student")):
        make_lm(vocab_size=len(tokenizer), seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with lzma.open(tmp_path / "t0_50k_short.jsonl.xz", "wt") as file:
        file.write((json.dumps({"prompt": "the film is", "response": "very good"}) + "\n") * 8)
    task = {"instruction": "the plot", "instances": [{"input": "", "output": "dull"}]}
    files = {
        "self_instruct_seed_tasks.jsonl": [task] * 4,
        "self_instruct_user_oriented_252.jsonl": [task] * 3,
        "vicuna_80_question.jsonl": [{"question_id": i, "turns": ["the end"]} for i in range(3)],
        "vicuna_gpt4_reference.jsonl": [{"question_id": 1, "choices": [{"turns": ["so good"]}]}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def data_of(folder: Path) -> dict[str, str]:
    """The options that name the files of a folder, which holds the data sets or small ones."""
    evaluated = ("self_instruct_user_oriented_252.jsonl", "vicuna_80_question.jsonl")
    return {
        "train_data": str(folder / "t0_50k_short.jsonl.xz"),
        "eval_data": " ".join(str(folder / name) for name in evaluated),
        "eval_references": str(folder / "vicuna_gpt4_reference.jsonl"),
    }


def rows_of(file: Path) -> int:
    return len(file.read_text().splitlines())


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> int:
    options = {
        "config": str(RECIPES / "distill_instruct.yaml"),
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "teacher_dtype": "float32",
        **data_of(folder),
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


@pytest.mark.parametrize("source", ["small files", *(["the data sets"] if REAL.is_dir() else [])])
def test_the_instruction_recipe_runs_from_prompts_to_rouge(source, folders, monkeypatch, capsys):
    data = folders if source == "small files" else REAL
    assert run(monkeypatch, folders, **data_of(data)) == 0
    summary = json.loads((folders / "out" / "summary.json").read_text())
    names = ("self_instruct_user_oriented_252", "vicuna_80_question")
    counts = [rows_of(data / f"{name}.jsonl") for name in names]
    assert counts == ([3, 3] if source == "small files" else [252, 80])
    answered = [counts[0], rows_of(data / "vicuna_gpt4_reference.jsonl")]
    out = capsys.readouterr().out
    assert "ROUGE-L" in out
    for name, prompts, references in zip(names, counts, answered, strict=True):
        metrics = summary[name]
        # Prompts without a reference are sampled from, and no more.
        assert (metrics["prompts"], metrics["rouge_l_n"]) == (prompts, references)
        assert 0 <= metrics["rouge_l"] < 1
        assert metrics["own/divergence/rkl"] > 0
        assert rows_of(folders / "out" / f"samples_{name}.jsonl") == prompts
        assert str(prompts) in out
    assert (folders / "out" / "student" / "model.safetensors").is_file()


def test_json_is_all_that_standard_output_gets(folders, monkeypatch, capsys):
    assert run(monkeypatch, folders, max_steps=1, json="-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((folders / "out" / "summary.json").read_text())
    assert "ROUGE-L" in err
    assert "json" not in json.loads((folders / "out" / "settings.json").read_text())
    assert run(monkeypatch, folders, json="/no/such/file.json") == 2
    assert "cannot write '/no/such/file.json'" in capsys.readouterr().err


def test_errors_of_a_single_reference_are_null(folders, monkeypatch):
    assert run(monkeypatch, folders) == 0
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert summary["vicuna_80_question"]["rouge_l_se"] is None  # inf is not JSON


@pytest.mark.parametrize("source", ["small files", *(["the data sets"] if REAL.is_dir() else [])])
def test_the_seed_tasks_can_be_trained_on(source, folders, monkeypatch):
    file = (folders if source == "small files" else REAL) / "self_instruct_seed_tasks.jsonl"
    assert run(monkeypatch, folders, train_data=file, max_steps=1, num_eval=2) == 0


def test_training_rows_without_an_answer_are_left_out_and_counted(folders, monkeypatch, capsys):
    file = folders / "some.jsonl"
    rows = [{"prompt": "it is", "completion": answer} for answer in ("good", "", None, " ")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    assert run(monkeypatch, folders, train_data=file, max_steps=1, num_eval=1) == 0
    assert "left out: 6 of 8 training rows have no answer" in capsys.readouterr().out


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
    (final,) = [row for row in rows if "final/self_instruct_user_oriented_252/rouge_l" in row]
    summary = json.loads((folders / "out" / "summary.json").read_text())
    for name, metrics in summary.items():
        for key, value in metrics.items():
            if value is None:  # inf: the error of a single reference
                continue
            assert final[f"final/{name}/{key}"] == pytest.approx(value)


def stopped_run(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> int:
    """A run that is interrupted after its first step."""
    from rlkl.trainers import StopOnInterrupt

    def at_once(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = True

    with monkeypatch.context() as stopped:
        stopped.setattr(StopOnInterrupt, "on_step_end", at_once)
        return run(stopped, folder, **changes)


def test_a_stopped_run_goes_on_and_refuses_other_settings(folders, monkeypatch, capsys):
    assert stopped_run(monkeypatch, folders) == 130
    assert "stopped after step 1 of 2" in capsys.readouterr().out
    assert run(monkeypatch, folders, learning_rate=1e-3) == 2
    assert "unfinished run with learning_rate=5e-05, not 0.001" in capsys.readouterr().err
    # What is measured after training may change.
    held_out = folders / "self_instruct_user_oriented_252.jsonl"
    assert run(monkeypatch, folders, num_eval=2, eval_data=held_out) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "going on from" in out
    assert "vicuna_gpt4_reference.jsonl answers no held-out row" in out
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert {name: metrics["prompts"] for name, metrics in summary.items()} == {held_out.stem: 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name_or_path", "{folder}/teacher"),
        ("use_peft", True),
        ("attn_implementation", "sdpa"),
    ],
)
def test_a_stopped_run_does_not_go_on_with_another_student(
    name, value, folders, monkeypatch, capsys
):
    assert stopped_run(monkeypatch, folders) == 130
    value = str(value).format(folder=folders)
    capsys.readouterr()
    assert run(monkeypatch, folders, **{name: value}) == 2
    error = capsys.readouterr().err
    assert f"unfinished run with {name}=" in error
    assert f", not {value}: choose another --output_dir" in error


def test_a_run_that_diverges_ends_in_one_line_without_a_checkpoint(folders, monkeypatch, capsys):
    settings = {"learning_rate": 1e20, "max_grad_norm": 0, "warmup_steps": 0, "save_steps": 1}
    assert run(monkeypatch, folders, **settings) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: after step 1 what the model says of a few tokens is not finite")
    assert not list((folders / "out").glob("checkpoint-*"))


def test_an_optimiser_that_cannot_be_leaves_a_finished_run_alone(folders, monkeypatch, capsys):
    assert run(monkeypatch, folders) == 0
    assert run(monkeypatch, folders, lr_scheduler_type="cosine_with_min_lr") == 2
    assert "lr_scheduler_kwargs" in capsys.readouterr().err
    assert (folders / "out" / "summary.json").is_file()


def test_a_checkpoint_of_the_model_alone_is_refused(folders, monkeypatch, capsys):
    assert stopped_run(monkeypatch, folders, save_only_model=True) == 130
    assert run(monkeypatch, folders, save_only_model=True) == 2
    assert "holds no optimiser (save_only_model)" in capsys.readouterr().err


def test_a_run_in_the_folder_of_a_finished_one_takes_nothing_of_it(folders, monkeypatch, capsys):
    out = folders / "out"
    assert run(monkeypatch, folders, save_steps=1) == 0
    (out / "verdicts.jsonl").write_text("")
    changes: dict[str, Any] = {"loss": "rkl", "learning_rate": 1e-3, "seed": 5, "save_steps": 1}
    with monkeypatch.context() as killed:
        killed.setattr("rlkl.trainers.DistillTrainer.compute_loss", None)
        with pytest.raises(TypeError):  # before its first checkpoint
            run(killed, folders, **changes)
    capsys.readouterr()
    assert not (out / "student").exists()
    assert not list(out.glob("checkpoint-*"))
    assert (out / "verdicts.jsonl").is_file()
    assert run(monkeypatch, folders, **changes) == 0
    assert "going on from" not in capsys.readouterr().out


def test_checkpoints_of_something_else_are_left_alone(folders, monkeypatch, capsys):
    foreign = folders / "out" / "checkpoint-1"
    foreign.mkdir(parents=True)
    assert run(monkeypatch, folders) == 2
    assert "holds checkpoint-1 of something else" in capsys.readouterr().err
    assert foreign.is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": "none.jsonl"}, "no such file: none.jsonl"),
        ({"teacher_dtype": "int8"}, "teacher_dtype is 'int8'; use float32"),
        ({"loss": "kl"}, "divergence 'kl' is unknown"),
        (
            {"response_length": 50},
            "come to 69 tokens, and the model has 64 positions: set a smaller",
        ),
        ({"teacher_model_name_or_path": "/no/such"}, "no such model folder: /no/such"),
        ({"nonsense": 1}, "nonsense"),
        ({"num_eval": 0}, "num_eval is 0; give at least 1"),
        ({"threads": 0}, "threads is 0; give at least 1"),
        ({"sampling_temperature": "inf"}, "sampling_temperature is inf; it must be > 0 and finite"),
        (
            {"train_data": "{folder}/vicuna_80_question.jsonl"},
            "train_dataset: completion 0 is empty (3 of 3 are)",
        ),
        ({"eval_data": "{folder}/a.jsonl {folder}/a.json"}, "two sets are called"),
        ({"max_steps": 0}, "max_steps is 0 and num_train_epochs 3.0: nothing would be"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be at"),
        ({"learning_rate": "nan"}, "learning_rate is nan; it must be finite"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 has no effect: the trained model is loaded"),
        ({"load_in_8bit": True}, "load_in_8bit True has no effect"),
        ({"judge_url": "localhost:8000/v1"}, "the judge's url is 'localhost:8000/v1': it begins"),
        ({"judge_prompt": "mine.txt"}, "judge_prompt has no meaning without judge_url"),
        ({"teacher_model_name_or_path": "{folder}/vicuna_80_question.jsonl"}, "is a file: name"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(changes, message, folders, monkeypatch, capsys):
    changes = {name: str(value).format(folder=folders) for name, value in changes.items()}
    assert run(monkeypatch, folders, **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("name", ["train_data", "eval_data", "model_name_or_path"])
def test_empty_names_are_refused(name, folders, monkeypatch, capsys):
    words = ["--config", str(RECIPES / "distill_instruct.yaml"), f"--{name}", ""]
    monkeypatch.setattr(sys, "argv", ["rlkl", "distill", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == f"error: {name} is empty: name one, or leave it out\n"


def test_one_held_out_set_of_a_yaml_file_is_no_list_of_letters(folders, monkeypatch):
    from rlkl.cli.distill_run import DistillArguments

    assert DistillArguments(eval_data="test.jsonl").eval_data == ["test.jsonl"]  # pyright: ignore


def test_held_out_prompts_that_are_too_long_are_found_before_training(folders, monkeypatch, capsys):
    long = folders / "long.jsonl"
    long.write_text(json.dumps({"prompt": "film " * 70, "completion": "good"}) + "\n")
    options = {"config": folders / "mine.yaml", "response_length": 5, "eval_data": long}
    options["config"].write_text("seed: 0\n")  # the recipe limits prompts
    monkeypatch.setattr("rlkl.trainers.DistillTrainer.train", None)
    words = ["--model_name_or_path", folders / "student", "--output_dir", folders / "out"]
    words += ["--teacher_model_name_or_path", folders / "teacher"]
    words += ["--train_data", folders / "self_instruct_seed_tasks.jsonl"]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["rlkl", "distill", *map(str, words)])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert "long, rows 0 to 0: prompt and response come to 75 tokens" in error


def test_held_out_sets_of_one_file_name_are_told_apart_by_their_folders(folders, monkeypatch):
    row = json.dumps({"prompt": "it is", "completion": "good"}) + "\n"
    for count, name in enumerate(("d1", "d2"), start=1):
        (folders / name).mkdir()
        (folders / name / "test.jsonl").write_text(row * count)
    sources = f"{folders}/d1/test.jsonl {folders}/d2/test.jsonl"
    assert run(monkeypatch, folders, eval_data=sources, max_steps=1) == 0
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert {n: m["prompts"] for n, m in summary.items()} == {"d1-test": 1, "d2-test": 2}
    assert rows_of(folders / "out" / "samples_d2-test.jsonl") == 2


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
