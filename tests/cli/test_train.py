"""`rlkl ppo`, `rlkl rloo` and `rlkl grpo` as their users run them: tiny local models, stops,
nonsense.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file
from trl import GRPOConfig, RLOOConfig

from rlkl.cli.main import main
from rlkl.cli.sentiment.algorithms import ALGORITHMS
from rlkl.cli.sentiment.plot import plot_training
from rlkl.cli.sentiment.settings import GRPOArguments, RLOOArguments
from rlkl.trainers.run_config import bf16_is_fast
from tests.offline_wandb import history, offline_records, without_key
from tests.trainers.stopping import lines, untimed

LENGTH = {"ppo": "response_length", "rloo": "max_completion_length"}
LENGTH["grpo"] = LENGTH["rloo"]
every_command = pytest.mark.parametrize("command", list(LENGTH))


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No folder with recipes, and no W&B account."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("COLUMNS", "120")
    without_key(monkeypatch, tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, command: str, folder: Path, **changes: Any) -> int:
    """The exit code of two steps on the folder's models, with the command's own defaults."""
    options = {
        "model_name_or_path": folder / "policy",
        "reward_model": folder / "classifier",
        "judge_model": folder / "classifier",
        "prompts": folder / "prompts.txt",
        "eval_prompts": folder / "prompts.txt",
        "best_of_n": 4,
        "per_device_train_batch_size": 8,
        LENGTH[command]: 5,
        "max_steps": 2,
        "output_dir": folder / "run",
        "bf16": False,
        "report_to": "none",
    } | changes
    return called(monkeypatch, command, *(w for n, v in options.items() for w in (f"--{n}", v)))


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rlkl", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def at_once(self: object, args: object, state: object, control: Any, **others: object) -> None:
    """Ctrl-C in the first step."""
    control.should_save = control.should_training_stop = True


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for line in lines if "loss" in (record := json.loads(line))]


@every_command
def test_two_steps_end_in_tables_numbers_a_plot_and_a_policy(command, folders, monkeypatch, capsys):
    assert run(monkeypatch, command, folders) == 0
    summary = json.loads((folders / "run" / "summary.json").read_text())
    assert summary["initial_kl"] == 0
    assert summary["kl_rb"] > 0
    assert summary["reward_after"] != summary["reward_before"]
    assert summary["best_of_4"] > summary["reference_reward"]
    assert ("initial_ratio_error" in summary) == (command == "ppo")
    assert len(json.loads((folders / "run" / "samples.json").read_text())) == 5
    assert imread(folders / "run" / "training.png").size > 0
    assert (folders / "run" / "policy" / "model.safetensors").is_file()
    assert not list((folders / "run").glob("checkpoint-*"))
    out = capsys.readouterr().out
    assert f"Held-out prompts, {command.upper()}, KL by rb in both" in out
    assert "nats per response" in out
    written = out[out.index("Written to") :]
    assert ("completions.jsonl" in written) == (folders / "run" / "completions.jsonl").is_file()


def test_weights_below_an_adapter_may_be_bfloat16_and_a_base_may_recompute(
    folders, monkeypatch, capsys
):
    assert run(monkeypatch, "ppo", folders, dtype="bfloat16") == 2
    assert "with use_peft" in capsys.readouterr().err
    below_an_adapter = {"use_peft": True, "lora_target_modules": "c_attn", "dtype": "bfloat16"}
    assert run(monkeypatch, "ppo", folders, **below_an_adapter, activation_checkpointing=True) == 0
    summary = json.loads((folders / "run" / "summary.json").read_text())
    assert summary["initial_kl"] == summary["initial_ratio_error"] == 0
    assert summary["kl_rb"] > 0
    adapter = load_file(folders / "run" / "policy" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@every_command
def test_weights_below_an_adapter_may_have_8_bits(command, folders, monkeypatch, capsys):
    assert run(monkeypatch, command, folders, load_in_8bit=True) == 2
    assert "load_in_8bit True has no effect" in capsys.readouterr().err
    assert run(monkeypatch, command, folders, use_bnb_nested_quant=True, use_peft=True) == 2
    assert "has no effect without load_in_4bit" in capsys.readouterr().err
    below = {"use_peft": True, "lora_target_modules": "c_attn", "load_in_8bit": True}
    assert run(monkeypatch, command, folders, **below, learning_rate=0.01) == 0
    summary = json.loads((folders / "run" / "summary.json").read_text())
    assert summary["initial_kl"] == 0
    assert summary["kl_rb"] > 0
    policy = folders / "run" / "policy"
    assert (policy / "adapter_model.safetensors").is_file()
    assert not (policy / "model.safetensors").exists()


@every_command
def test_json_is_all_that_standard_output_gets(command, folders, monkeypatch, capsys):
    assert run(monkeypatch, command, folders, max_steps=1, json="-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((folders / "run" / "summary.json").read_text())
    assert "Held-out prompts" in err
    assert run(monkeypatch, command, folders, max_steps=1, json=folders / "again.json") == 0
    assert json.loads((folders / "again.json").read_text()).keys() == json.loads(out).keys()
    assert "json" not in json.loads((folders / "run" / "settings.json").read_text())


def test_the_completions_that_grpo_logs_are_kept_and_replaced_with_its_run(folders, monkeypatch):
    completions = folders / "run" / "completions"
    for steps in (2, 1):
        assert run(monkeypatch, "grpo", folders, max_steps=steps, log_completions=True) == 0
        assert len(list(completions.glob("*.parquet"))) == steps


@every_command
def test_the_help_has_an_example_and_the_settings_with_their_defaults(command, monkeypatch, capsys):
    assert called(monkeypatch, command, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: rlkl {command} " in out
    assert f"Example: rlkl {command} --" in out
    assert f"--{LENGTH[command]}" in out
    assert f"(default: runs/sentiment_{command})" in " ".join(out.split())


@every_command
def test_all_three_are_listed(command, monkeypatch, capsys):
    assert called(monkeypatch, "--help") == 0
    assert f"{command} " in capsys.readouterr().out


@every_command
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_coeff": 0.1}, "kl_coeff"),
        ({"config": "none.yaml"}, "none.yaml"),
        ({"config": "{folder}/bad.yaml"}, "kl_coeff"),
        ({"prompts": "none.txt"}, "none.txt"),
        ({"model_name_or_path": "/no/such"}, "no such model folder: /no/such"),
        ({"resume_from_checkpoint": "a"}, "the same command goes on from the last checkpoint"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"),
        ({"optim": "lomo"}, "lomo_optim"),  # an ImportError
        ({"adam_beta1": 2}, "adam_beta1 is 2.0; it must lie in [0, 1)"),
        ({"lora_dropout": "nan"}, "lora_dropout is nan; give a finite number"),
        ({"reward_clamp": "inf"}, "reward_clamp is inf; give a finite number"),
        ({"save_steps": "inf"}, "save_steps is inf; give the steps from one to the next"),
        ({"save_steps": 0}, "save_steps is 0; give the steps from one to the next"),
        ({"logging_steps": -1}, "logging_steps is -1; give the steps from one to the next"),
        ({"weight_decay": "nan"}, "weight_decay is nan; it must be finite and >= 0"),
        ({"max_grad_norm": "nan"}, "max_grad_norm is nan; 0 does not clip"),
        ({"num_train_epochs": "nan"}, "num_train_epochs is nan; it must be finite"),
        ({"attn_implementation": "nope"}, "; use eager or sdpa, or leave it out"),
        ({"best_of_n": 1}, "best_of_n is 1; give at least 2"),
        ({"json": "/no/such/file.json"}, "cannot write '/no/such/file.json'"),
        ({"eval_prompts": "{folder}/long.txt"}, "the held-out prompts, 0 to 1: prompt and resp"),
        ({"prompts": "{folder}/long.txt"}, "prompts"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    command, changes, message, folders, monkeypatch, capsys
):
    (folders / "long.txt").write_text("it is\n" + "film " * 61 + "\n")
    (folders / "bad.yaml").write_text(yaml.safe_dump({"kl_coeff": 0.1}))
    changes = {name: str(value).format(folder=folders) for name, value in changes.items()}
    assert run(monkeypatch, command, folders, **changes) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (folders / "run" / "settings.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 20}, "top_k is 20"),
        ({"beta": -1}, "beta is -1"),
        ({"per_device_train_batch_size": 6}, "num_generations"),
        ({"per_device_train_batch_size": 36}, "8 prompts, and a rollout takes 9"),
        ({"prompts": "{folder}/long.txt"}, "the training prompts, 0 to 1: prompt and response"),
        ({"beta": "inf"}, "beta is inf: it must be finite"),
        ({"temperature": "inf"}, "temperature is inf: it must be positive and finite"),
        ({"steps_per_generation": 0}, "steps_per_generation is 0: it must be at least 1"),
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        ({"num_iterations": 0}, "num_iterations is 0; it must be at least 1"),
        ({"num_generations": 0}, "num_generations is 0; a response is compared with the others"),
        ({"epsilon": "nan"}, "epsilon is nan: it is how far a ratio may be from 1"),
        ({"max_completion_length": 0}, "max_completion_length is 0; it must be at least 1"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
    ],
)
def test_settings_of_rloo_that_cannot_be_trained_with_are_bad_input_too(
    changes, message, folders, monkeypatch, capsys
):
    (folders / "long.txt").write_text("it is\n" + "film " * 61 + "\n")
    changes = {name: str(value).format(folder=folders) for name, value in changes.items()}
    assert run(monkeypatch, "rloo", folders, **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@every_command
def test_a_stopped_run_goes_on_and_refuses_other_settings(command, folders, monkeypatch, capsys):
    with monkeypatch.context() as stopped:
        stopped.setattr("rlkl.trainers.StopOnInterrupt.on_step_end", at_once)
        assert run(stopped, command, folders) == 130
    assert "stopped after step 1 of 2" in capsys.readouterr().out
    assert run(monkeypatch, command, folders, learning_rate=1e-5) == 2
    assert "unfinished run with learning_rate=0.0003, not 1e-05" in capsys.readouterr().err
    assert run(monkeypatch, command, folders) == 0
    assert "going on from" in capsys.readouterr().out
    assert steps_of(folders) == [1, 2]
    assert run(monkeypatch, command, folders, output_dir=folders / "whole") == 0
    found, expected = (
        [untimed(record) for record in lines(folders / name)] for name in ("run", "whole")
    )
    assert found == expected


@every_command
def test_a_run_killed_after_its_last_step_measures_and_trains_no_more(
    command, folders, monkeypatch
):
    with monkeypatch.context() as killed:
        killed.setattr("rlkl.cli.sentiment.held_out.evaluate_policy", once())
        assert run(killed, command, folders, save_steps=1, keep_checkpoints=True) == 130
    trained = torch.load(folders / "run" / "checkpoint-2" / "optimizer.pt")
    assert run(monkeypatch, command, folders, save_steps=1, keep_checkpoints=True) == 0
    assert steps_of(folders) == [1, 2]
    assert not (folders / "run" / "checkpoint-3").exists()
    after = torch.load(folders / "run" / "checkpoint-2" / "optimizer.pt")
    assert str(after["state"]) == str(trained["state"])
    weights, saved = (
        (folders / "run" / name / "model.safetensors").read_bytes()
        for name in ("policy", "checkpoint-2")
    )
    assert weights == saved


@every_command
def test_a_stopped_run_whose_checkpoint_is_the_model_alone_is_refused(
    command, folders, monkeypatch, capsys
):
    with monkeypatch.context() as stopped:
        stopped.setattr("rlkl.trainers.StopOnInterrupt.on_step_end", at_once)
        assert run(stopped, command, folders, save_only_model=True) == 130
    assert run(monkeypatch, command, folders, save_only_model=True) == 2
    assert "checkpoint-1 holds no optimiser (save_only_model)" in capsys.readouterr().err


# wandb's own code under Python 3.11 and pydantic 2
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@every_command
@pytest.mark.parametrize("saving", [{"save_steps": 1}, {"save_strategy": "no", "max_steps": 1}])
def test_a_run_that_diverges_ends_in_one_line_without_a_checkpoint(
    command, saving, folders, monkeypatch, capsys
):
    settings = {"learning_rate": 1e20, "max_grad_norm": 0, "report_to": "wandb"} | saving
    assert run(monkeypatch, command, folders, **settings) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: after step ")
    assert "is not finite" in error
    assert not list((folders / "run").glob("checkpoint-*"))
    assert not (folders / "run" / "summary.json").exists()
    (code,) = [r.exit.exit_code for r in offline_records(folders / "run") if r.HasField("exit")]
    assert code == 1  # which W&B shows as failed


def once() -> Callable[..., Any]:
    """The evaluation before training works, the one after is interrupted."""
    from rlkl.evaluation import evaluate_policy

    calls: list[int] = []

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return evaluate_policy(*args, **kwargs)

    return evaluate


def test_an_adapter_has_its_own_base_as_reference(folders, monkeypatch):
    assert run(monkeypatch, "rloo", folders, use_peft=True, learning_rate=0.01) == 0
    summary = json.loads((folders / "run" / "summary.json").read_text())
    assert summary["initial_kl"] == 0
    assert summary["kl_rb"] > 0
    assert (folders / "run" / "policy" / "adapter_model.safetensors").is_file()


# wandb's own code under Python 3.11 and pydantic 2
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("command", ["rloo", "grpo"])
def test_wandb_gets_one_run_with_steps_samples_and_summary(command, folders, monkeypatch):
    assert run(monkeypatch, command, folders, report_to="wandb", wandb_project="mine") == 0
    records = offline_records(folders / "run")  # one, below the output folder
    (opened,) = (r.run for r in records if r.HasField("run"))
    assert (opened.project, opened.run_group) == ("mine", f"{command}-rb-both")
    assert set(opened.tags) == {"sentiment", command, "rb", "both"}
    config = {item.key: json.loads(item.value_json) for item in opened.config.update}
    assert config["kl_coef"] > 0  # by one name, whatever the command calls it
    rows = history(records)
    assert any("train/kl/rb" in row for row in rows)
    assert any("samples/path" in row for row in rows)
    assert not list(Path.cwd().iterdir())


@every_command
def test_every_key_of_the_defaults_is_a_setting(command):
    algorithm = ALGORITHMS[command.upper()]
    known = {name for each in algorithm.settings for name in each.__dataclass_fields__}
    assert yaml.safe_load(Path(algorithm.defaults).read_text()).keys() <= known


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # TRL's own default
@pytest.mark.parametrize(
    ("settings", "trls"), [(RLOOArguments, RLOOConfig), (GRPOArguments, GRPOConfig)]
)
def test_trls_settings_are_its_own_but_for_bf16_where_the_hardware_is_fast_at_it(
    settings, trls, tmp_path
):
    folder = str(tmp_path)
    assert settings(output_dir=folder).bf16 == bf16_is_fast()
    for chosen in (True, False):
        assert settings(output_dir=folder, bf16=chosen).bf16 is chosen
    theirs = asdict(trls(output_dir=folder, bf16=False, use_cpu=True))
    ours = asdict(settings(output_dir=folder, bf16=False, use_cpu=True))
    assert {name: ours[name] for name in theirs} == theirs


def test_a_single_rollout_is_seen_in_the_plot(tmp_path):
    names = ("objective/scores", "judge/held_out", "kl/k1", "kl/rb")
    step = {"step": 1.0} | dict.fromkeys(names, 1.0) | {f"{n}_se": 0.1 for n in names}
    summary = {"best_of_4": 2.0, "reference_reward": 0.0, "seed": 0}
    plot_training([step], summary, "RLOO", "one update", tmp_path / "plot.png")
    image = (imread(tmp_path / "plot.png")[..., :3] * 255).round()
    middle = image[:, image.shape[1] // 2 : int(0.65 * image.shape[1])]  # no legend is there
    green = torch.tensor([44, 160, 44])  # tab:green, drawn last
    assert (torch.as_tensor(middle) == green).all(-1).sum() > 20
