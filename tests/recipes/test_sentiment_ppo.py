"""The recipe as its users run it: two steps on tiny local models, nonsense, and being stopped."""

import ast
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlkl.cli.sentiment.algorithms import PPO
from rlkl.sweep.recipe import recipe_settings
from rlkl.trainers import PPOTrainer

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted(p for p in RECIPES.glob("*.py") if '__name__ == "__main__"' in p.read_text())


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("COLUMNS", "120")


def arguments(folder: Path, **changes: Any) -> list[str]:
    """A command line of two steps on the folder's models."""
    options = {
        "config": str(RECIPES / "sentiment_ppo.yaml"),
        "model_name_or_path": str(folder / "policy"),
        "reward_model": str(folder / "classifier"),
        "judge_model": str(folder / "classifier"),
        "prompts": str(folder / "prompts.txt"),
        "eval_prompts": str(folder / "prompts.txt"),
        "best_of_n": 4,
        "per_device_train_batch_size": 8,
        "response_length": 5,
        "max_steps": 2,
        "output_dir": str(folder / "run"),
        "bf16": False,
    } | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run(monkeypatch: pytest.MonkeyPatch, script: str, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(RECIPES / script), run_name="__main__")


def test_two_steps_write_everything_that_the_readme_names(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "sentiment_ppo.py", arguments(folders))
    summary = json.loads((folders / "run" / "summary.json").read_text())
    expected = (
        "reward_before reward_after reward_se judge_before judge_after best_of_4 kl_rb kl_rb_se "
        "kl_k1 kl_k1_se initial_kl seconds seed"
    )
    assert set(expected.split()) <= summary.keys()
    assert summary["initial_kl"] == 0
    assert summary["initial_ratio_error"] == 0
    assert summary["kl_rb"] > 0
    for name in ("samples.json", "metrics.jsonl", "completions.jsonl", "training.png"):
        assert (folders / "run" / name).stat().st_size > 0
    assert (folders / "run" / "policy" / "model.safetensors").is_file()
    assert not list((folders / "run").glob("checkpoint-*"))
    assert "Held-out prompts" in capsys.readouterr().out


def test_brackets_in_a_text_are_no_markup_that_ends_the_run(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "prompts.txt").write_text("it is[/i]\n" * 8)
    run(monkeypatch, "sentiment_ppo.py", arguments(folders, max_steps=1))
    assert "it is[/i]" in capsys.readouterr().out


def test_a_single_step_ends_in_a_summary(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "sentiment_ppo.py", arguments(folders, max_steps=1))
    summary = json.loads((folders / "run" / "summary.json").read_text())
    assert summary["train_se_ratio_k1_over_rb"] is None  # the KL was 0: there is no error


def test_held_out_prompts_are_cut_like_those_of_training(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders / "prompts.txt").write_text(("the film " * 60 + "it is\n") * 8)
    run(monkeypatch, "sentiment_ppo.py", arguments(folders, max_steps=1, max_prompt_length=8))
    assert (folders / "run" / "summary.json").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a library at its import
@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_every_recipe_says_its_options(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(RECIPES)  # as for a script
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, script, ["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    docstring = ast.get_docstring(ast.parse((RECIPES / script).read_text())) or ""
    for line in docstring.splitlines():
        assert line.strip() in printed


def test_the_papers_configuration_takes_local_folders_for_hub_ids(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(folders, config=RECIPES / "sentiment_ppo_gpt2.yaml", num_mini_batches=2)
    run(monkeypatch, "sentiment_ppo.py", words)
    assert (folders / "run" / "summary.json").is_file()


def test_a_killed_run_goes_on_from_its_checkpoint_and_records_each_step_once(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PPOTrainer.training_step

    def dies_at_the_fourth(self: PPOTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    words = arguments(folders, max_steps=4, save_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "training_step", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            run(patch, "sentiment_ppo.py", words)
    assert not (folders / "run" / "summary.json").exists()
    # A sweep says arm and tags; one that began before it did goes on all the same.
    run(monkeypatch, "sentiment_ppo.py", [*words, "--wandb_arm", "rb", "--wandb_tags", "mine"])
    lines = (folders / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [record["step"] for record in steps if "kl/rb" in record] == [1, 2, 3, 4]


def test_an_unfinished_run_with_other_settings_is_not_overwritten(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rlkl.cli.sentiment.held_out.evaluate_policy", evaluate_once())
        with pytest.raises(KeyboardInterrupt):
            run(patch, "sentiment_ppo.py", arguments(folders, save_steps=1))
    refused(monkeypatch, capsys, arguments(folders, kl_coef=0.9), "kl_coef")


def evaluate_once() -> Callable[..., Any]:
    """The evaluation before training works, the one after is interrupted."""
    from rlkl.evaluation import evaluate_policy

    calls: list[int] = []

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return evaluate_policy(*args, **kwargs)

    return evaluate


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    """Exit code 2 and one line of standard error that says what is wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "sentiment_ppo.py", words)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]


def config_with_unknown_key(folder: Path) -> dict[str, Any]:
    (folder / "bad.yaml").write_text(yaml.safe_dump({"kl_coeff": 0.1}))
    return {"config": folder / "bad.yaml"}


def empty_prompts(folder: Path) -> dict[str, Any]:
    (folder / "empty.txt").write_text("\n\n")
    return {"prompts": folder / "empty.txt"}


def without_weights(folder: Path) -> dict[str, Any]:
    (folder / "policy" / "model.safetensors").unlink()
    return {}


def other_tokenizer(folder: Path) -> dict[str, Any]:
    text = (folder / "policy" / "tokenizer.json").read_text()
    (folder / "ref").mkdir()
    for file in (folder / "policy").iterdir():
        (folder / "ref" / file.name).write_bytes(file.read_bytes())
    (folder / "ref" / "tokenizer.json").write_text(text.replace('"superb"', '"sublime"'))
    return {"ref_model_name_or_path": folder / "ref"}


def without_positive_label(folder: Path) -> dict[str, Any]:
    file = folder / "classifier" / "config.json"
    config = json.loads(file.read_text())
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    config["label2id"] = {"LABEL_0": 0, "LABEL_1": 1}
    file.write_text(json.dumps(config))
    return {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (config_with_unknown_key, "kl_coeff"),
        (lambda folder: {"config": folder / "none.yaml"}, "none.yaml"),
        (lambda folder: {"kl_coeff": 0.1}, "kl_coeff"),
        (lambda folder: {"prompts": folder / "none.txt"}, "none.txt"),
        (empty_prompts, "no prompts"),
        (without_weights, "no weights"),
        (lambda folder: {"model_name_or_path": folder / "none"}, "no such model folder"),
        (other_tokenizer, "different tokenizers"),
        (without_positive_label, "positive"),
        (lambda folder: {"kl_coef": -0.1}, "kl_coef"),
        (lambda folder: {"num_mini_batches": 3}, "num_mini_batches"),
        (lambda folder: {"kl_estimator": "rb", "kl_placement": "reward"}, "own-token gradient"),
        (lambda folder: {"kl_estimator": "k9"}, "k9"),
        (lambda folder: {"learning_rate": "fast"}, "fast"),
        (lambda folder: {"per_device_train_batch_size": 9}, "8 prompts"),
        (lambda folder: {"best_of_n": 1}, "best_of_n is 1; give at least 2"),
        (lambda folder: {"num_eval_prompts": -1}, "num_eval_prompts is -1; give at least 2"),
    ],
)
def test_bad_input_gets_one_line_exit_code_2_and_writes_nothing(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], dict[str, Any]],
    message: str,
) -> None:
    refused(monkeypatch, capsys, arguments(folders, **spoil(folders)), message)
    assert not (folders / "run").exists()


@pytest.mark.parametrize("file", sorted(RECIPES.glob("sentiment_ppo*.yaml")), ids=lambda f: f.name)
def test_every_key_of_every_recipe_is_a_setting(file: Path) -> None:
    settings = recipe_settings(str(RECIPES / "sentiment_ppo.py"))  # what a sweep reads
    known = {name for each in settings for name in each.__dataclass_fields__}
    assert yaml.safe_load(file.read_text()).keys() <= known


def test_the_command_has_the_recipes_defaults() -> None:
    shipped = Path(PPO.defaults).read_bytes()
    assert shipped == (RECIPES / "sentiment_ppo.yaml").read_bytes()
