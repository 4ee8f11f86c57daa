"""Sweeps over rlkl's own trainers: one vocabulary, whatever trains, and one page for all."""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from rlkl.cli.main import main
from rlkl.cli.sentiment.algorithms import ALGORITHMS as COMMANDS
from rlkl.cli.sentiment.algorithms import Algorithm
from rlkl.cli.sweep import command_named
from rlkl.sweep.algorithms import ALGORITHMS
from rlkl.sweep.driver import begin_sweep
from rlkl.sweep.ledger import open_ledger
from rlkl.sweep.records import SweepResult, collect
from rlkl.sweep.spec import SweepSpec
from rlkl.sweep.spec_file import load_spec, spec_yaml
from rlkl.sweep.storage import default_storage
from rlkl.sweep.worker import Worker

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def load(tmp_path):
    """Reads a sweep of no recipe, given as a mapping."""

    def read(**data) -> SweepSpec:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(data))
        return load_spec(file, command_named)

    return read


def test_every_command_that_trains_can_be_swept_by_the_names_of_its_settings():
    assert [name.upper() for name in ALGORITHMS] == list(COMMANDS)
    for name, algorithm in ALGORITHMS.items():
        classes = command_named(name).settings
        known = {field for each in classes for field in each.__dataclass_fields__}
        for setting in ("kl_coef", "response_length", *algorithm.fixed):
            assert (algorithm.own_names.get(setting, setting) in known) == (
                setting not in algorithm.fixed
            )


def test_the_shipped_sweep_compares_the_three_at_the_defaults_of_their_commands(tmp_path):
    spec = load_spec(RECIPES / "sweep_algorithms.yaml", command_named)
    assert spec.num_cells == 27
    assert [spec.arm_name(arm) for arm in spec.arms[::3]] == ["ppo rb", "rloo", "grpo"]
    settings = [spec.configuration(n).settings for n in (0, 3, 6)]
    assert [s["max_steps"] for s in settings] == [50, 100, 100]
    assert [s["kl_coef"] for s in settings] == [0.1] * 3
    assert {s["response_length"] for s in settings} == {24}
    assert all("output_dir" not in s for s in settings)
    assert SweepSpec.from_json(spec.to_json()) == spec
    (tmp_path / "again.yaml").write_text(spec_yaml(asdict(spec)))
    assert load_spec(tmp_path / "again.yaml", command_named) == spec
    again = tmp_path / "spec.yaml"  # as a report leaves it
    again.write_text(yaml.safe_dump(json.loads(spec.to_json()), sort_keys=False))
    assert load_spec(again, command_named) == spec
    with pytest.raises(ValueError, match=r"give it rlkl\.cli\.sweep\.command_named"):
        load_spec(again)


def test_trls_names_mean_the_same_and_a_config_holds_for_the_command(load, tmp_path):
    base = {"max_completion_length": 12, "num_generations": 2, "beta": 9.0}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    spec = load(algorithm="rloo", config="base.yaml", grid={"beta": [0.1, "1e-3"]})
    first = spec.configuration(0)
    assert (first.arm, first.label) == ("rloo", "rloo kl_coef=0.1")
    assert first.settings["response_length"] == 12
    assert first.settings["num_generations"] == 2
    assert "max_completion_length" not in first.settings
    assert "max_steps" not in first.settings, "it is no command's default any more"


def test_a_strength_that_a_sweep_never_names_is_each_commands_own(load):
    spec = load(grid={"algorithm": ["ppo", "grpo"], "learning_rate": [1e-4, 1e-3]})
    assert [spec.configuration(n).settings["kl_coef"] for n in (0, 2)] == [0.29, 0.2]
    arms = list(dict.fromkeys(spec.arm_name(arm) for arm in spec.arms))
    assert arms[0] == "ppo learning_rate=0.0001"
    assert len(arms) == 4


def test_arms_of_several_algorithms_have_settings_of_their_own(load):
    arms = [
        {"algorithm": "ppo", "kl_estimator": "k1", "kl_placement": "reward"},
        {"algorithm": "ppo", "num_ppo_epochs": 2},
        {"algorithm": "rloo", "num_iterations": 2},
    ]
    spec = load(grid={"arm": arms}, settings={"max_steps": 7})
    assert [spec.arm_name(arm) for arm in spec.arms] == ["ppo k1", "ppo rb", "rloo"]
    last = spec.configuration(2).settings
    assert (last["algorithm"], last["num_iterations"], last["max_steps"]) == ("rloo", 2, 7)
    assert "num_ppo_epochs" not in last


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"algorithm": "dpo", "grid": {}}, "algorithm is 'dpo'; use ppo, rloo or grpo"),
        ({"algorithm": ["ppo", "rloo"]}, "several algorithms are an axis; put the list into the"),
        ({"grid": {"algorithm": [5]}}, "algorithm is 5; use ppo"),
        ({"grid": {"a": [{"algorithm": "ppo"}, {"kl_coef": 1.0}]}}, "or in its place as algorithm"),
        ({"algorithm": "ppo", "recipe": "x.py"}, "a recipe and an algorithm: leave one out"),
        (
            {"recipe": str(RECIPES / "sentiment_ppo.py"), "grid": {"algorithm": ["ppo"]}},
            "algorithm takes a recipe's place; leave recipe out",
        ),
        (
            {"grid": {"algorithm": ["ppo", "rloo"]}, "settings": {"num_ppo_epochs": 2}},
            "a setting of ppo and none of rloo; give it to the arms that have it: {algorithm: ppo,",
        ),
        (
            {"grid": {"algorithm": ["ppo", "rloo"], "kl_estimator": ["k1"]}},
            "grid for rloo: kl_estimator is a setting of ppo and none of rloo",
        ),
        ({"algorithm": "rloo", "grid": {"beta": [1.0], "kl_coef": [1.0]}}, "which are one setting"),
        ({"algorithm": "rloo", "grid": {"max_completion_length": [8, 9]}}, "cannot be varied"),
        ({"algorithm": "rloo", "defaults": {"rloo": {"beta": 1.0, "kl_coef": 1.0}}}, "one setting"),
        (
            {"algorithm": "rloo", "grid": {"beta": [-1.0]}},
            "beta is -1.0: it must be finite, and at least 0",
        ),
        ({"algorithm": "grpo", "grid": {"kl_coef": ["1e400"]}}, "beta is inf: it must be"),
        ({"algorithm": "ppo", "grid": {"kl_coef": ["1e400"]}}, "kl_coef is inf; it must be"),
        ({"algorithm": "ppo", "grid": {"kl_coef": ["nan"]}}, "kl_coef is nan; it must be"),
        ({"algorithm": "grpo", "settings": {"top_k": 20}}, "top_k is 20"),
        ({"algorithm": "grpo", "defaults": {"rloo": {}}}, "defaults: unknown field 'rloo'"),
        ({"algorithm": "grpo", "defaults": {"grpo": {"x": 1}}}, "base settings of grpo: unknown"),
        (
            {"grid": {"algorithm": ["ppo", "ppo"]}},
            "two points of the grid are the same: rb, rb",
        ),
    ],
)
def test_nonsense_is_refused_and_the_way_out_said(load, data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(**data)


def test_what_is_measured_is_the_same_for_all_algorithms(load, tmp_path):
    """Their defaults agree; should they part, a sweep says so before it starts."""
    other, file = tmp_path / "rloo.yaml", tmp_path / "two.yaml"
    other.write_text(Path(command_named("rloo").defaults).read_text() + "temperature: 0.5\n")

    def commands(name: str) -> Algorithm:
        command = command_named(name)
        return replace(command, defaults=str(other)) if name == "rloo" else command

    file.write_text("grid: {algorithm: [ppo, rloo]}")
    with pytest.raises(ValueError, match=r"temperature is 1\.0 in ppo rb and 0\.5 in rloo: it def"):
        load_spec(file, commands)
    file.write_text("algorithm: rloo")
    assert load_spec(file, commands).settings["temperature"] == 0.5


def test_a_worker_needs_no_recipe_for_an_algorithm_and_refuses_one(load, tmp_path):
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", load(algorithm="grpo"), "identity")
    assert Worker(ledger, tmp_path, threads=1).recipe is None
    with pytest.raises(ValueError, match="mine runs rlkl's own algorithms: leave --recipe out"):
        Worker(ledger, tmp_path, threads=1, recipe="x.py")


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rlkl", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_shipped_sweep_in_small_goes_on_after_a_stop_and_ends_in_one_page(
    folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    data = yaml.safe_load((RECIPES / "sweep_algorithms.yaml").read_text())
    data["grid"]["kl_coef"], data["seeds"] = [0.3], [0]
    data["evaluation"] = {"prompts": 4, "responses_per_prompt": 2, "reference_samples": 32}
    data["settings"] |= {
        "model_name_or_path": str(folders / "policy"),
        "reward_model": str(folders / "classifier"),
        "judge_model": str(folders / "classifier"),
        "prompts": str(folders / "prompts.txt"),
        "eval_prompts": str(folders / "prompts.txt"),
        "num_eval_prompts": 2,
        "per_device_train_batch_size": 8,
        "response_length": 5,
        "max_steps": 2,
        "bf16": False,
        "report_to": "none",
    }
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(data))

    # RLOO's cell is begun and stopped after a step, by the command that a worker runs.
    ledger = begin_sweep(load_spec(file, command_named), default_storage(out), out)
    worker = Worker(ledger, out, threads=1)
    cells = {cell.settings.get("algorithm"): cell for cell in ledger.cells()}
    folder = out / cells["rloo"].key
    folder.mkdir()
    worker._write_plan(cells["rloo"], folder)
    words = json.loads((folder / "cell.json").read_text())["command"]
    assert words == ["-m", "rlkl", "rloo"]
    with monkeypatch.context() as stopped:

        def at_once(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = True

        stopped.setattr("rlkl.trainers.StopOnInterrupt.on_step_end", at_once)
        assert called(stopped, words[-1], "--config", folder / "settings.yaml") == 130
    assert "stopped after step 1 of 2" in capsys.readouterr().out

    assert called(monkeypatch, "sweep", "run", file, "--out", out) == 0, capsys.readouterr().err
    assert "going on from" in (folder / "output.log").read_text()
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for line in lines if "loss" in (row := json.loads(line))] == [1, 2]

    result = collect(ledger)
    assert [p.algorithm for p in result.points] == ["ppo", "rloo", "grpo"]
    assert result.arms == ["ppo rb", "rloo", "grpo"]
    assert {(p.kl_coef, p.estimator, p.placement, p.step) for p in result.points} == {
        (0.3, "rb", "both", 2)
    }
    (how,) = result.measured
    assert (how["prompts"], how["responses_per_prompt"], how["response_length"]) == (4, 2, 5)
    assert (how["temperature"], how["max_prompt_length"]) == (1.0, None)
    page = (out / "report" / "index.html").read_text()
    assert "Trained by rlkl ppo and rlkl rloo and rlkl grpo." in page
    assert "<th>algorithm</th>" in page
    assert "prompts_sha256" in page
    assert SweepResult.load(out / "report" / "records.jsonl").points == result.points
