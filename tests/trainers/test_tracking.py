"""W&B without a key: it never asks, writes below the output folder, and mirrors the files."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import wandb
from transformers import TrainerCallback

from rlkl.trainers import DistillConfig, PPOConfig, RaoBlackwellPPOTrainer
from rlkl.trainers.tracking import wandb_mode
from tests.offline_wandb import history, offline_records, without_key

# wandb's own code under Python 3.11 and pydantic 2
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _no_key_and_nobody_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_key(monkeypatch, tmp_path)


def test_without_a_key_runs_are_offline(monkeypatch):
    assert wandb_mode() == "offline"


def test_with_a_key_runs_are_online_unless_the_environment_says_otherwise(monkeypatch):
    """The look-up itself is replaced: a key that was found stays with W&B for the whole process."""
    monkeypatch.setattr(wandb, "login", lambda *, prompt, verify: not prompt and not verify)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_a_whole_run_and_its_evaluations_are_in_one_offline_run(
    make_trainer, prompts, tmp_path, steps
):
    """Evaluating before and after training is what a recipe does."""
    folder = tmp_path / "run"
    trainer = make_trainer(
        RaoBlackwellPPOTrainer,
        report_to=["wandb"],
        wandb_tags="test",  # as a YAML file may have it
        wandb_arm="rb/both",
        eval_dataset=prompts,
        num_completions=3,
    )
    before = trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert wandb.run is None, "the run must be finished"
    assert not (Path.cwd() / "wandb").exists()

    records = offline_records(folder)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert run.project == "rlkl"
    assert run.run_group == "rb-both"
    assert set(run.tags) == {"rb", "both", "RaoBlackwellPPOTrainer", "test"}
    assert run.run_id == (folder / "wandb_run_id.txt").read_text()
    config = {i.key: json.loads(i.value_json) for i in run.config.update}
    assert config["kl_coef"] == 0.1
    assert config["wandb_arm"] == "rb/both"
    assert config["response_length"] == 6

    rows = history(records)
    logged = [row for row in rows if "train/kl/rb" in row]
    assert [row["train/kl/rb"] for row in logged] == [step["kl/rb"] for step in steps(trainer)]
    tables = [row["completions/path"] for row in rows if "completions/path" in row]
    assert len(tables) == 1, [sorted(row) for row in rows]
    table = json.loads((next((folder / "wandb").rglob(Path(tables[0]).name))).read_text())
    assert {"prompt", "response", "score", "kl/rb"} <= set(table["columns"])
    assert len(table["data"]) == 3
    evaluations = [row["eval/kl/rb"] for row in rows if "eval/kl/rb" in row]
    assert not evaluations, "outside of a run they are in the files alone"
    assert before["eval_kl/rb"] == 0


def test_group_and_project_can_be_named(make_trainer):
    named = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            named.update(group=wandb.run.group, project=wandb.run.project)

    settings = {"wandb_group": "mine", "wandb_project": "other", "max_steps": 1}
    make_trainer(report_to=["wandb"], callbacks=[Look()], **settings).train()
    assert named == {"group": "mine", "project": "other"}


def test_a_new_training_in_the_same_folder_is_a_run_of_its_own(make_trainer, tmp_path):
    ids = []
    for _ in range(2):
        make_trainer(report_to=["wandb"], max_steps=1).train()
        ids.append((tmp_path / "run" / "wandb_run_id.txt").read_text())
    assert ids[0] != ids[1]


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_raises_is_failed(make_distiller, tmp_path, fails):
    trainer = make_distiller(report_to=["wandb"], max_steps=1)
    if fails:
        trainer.model.transformer.wte.weight.data[:] = torch.nan
    with pytest.raises(FloatingPointError) if fails else nullcontext():
        trainer.train()
    records = offline_records(tmp_path / "run")
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [int(fails)]


@pytest.mark.parametrize("config", [PPOConfig, DistillConfig])
def test_wandb_is_asked_for(config, tmp_path):
    """Making or training a trainer sends nothing by itself, whatever key the machine has."""
    run = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert config(**run).report_to == []
    assert config(**run, report_to="wandb").report_to == ["wandb"]


def test_a_run_that_reports_nowhere_is_in_its_files(make_trainer, quick_run, monkeypatch, tmp_path):
    del quick_run["report_to"]

    def opened(**settings: object) -> None:
        raise AssertionError("a W&B run was opened")

    monkeypatch.setattr(wandb, "init", opened)
    make_trainer(max_steps=1).train()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert not (tmp_path / "run" / "wandb").exists()
