"""`rlkl ppo` and `rlkl distill` under torchrun: one run, written once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.offline_wandb import history, offline_records, without_key

PAIRS = [{"prompt": "the film is", "completion": "very good"}] * 8


def torchrun(command: str, **options: Any) -> str:
    """What two processes of it print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "rlkl", command, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def steps_of(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for line in lines if "loss" in (record := json.loads(line))]


def test_ppo_prints_and_writes_once_and_has_one_wandb_run(folders, monkeypatch, tmp_path):
    without_key(monkeypatch, tmp_path)
    run = folders / "run"
    out = torchrun(
        "ppo",
        model_name_or_path=folders / "policy",
        reward_model=folders / "classifier",
        judge_model=folders / "classifier",
        prompts=folders / "prompts.txt",
        eval_prompts=folders / "prompts.txt",
        best_of_n=4,
        per_device_train_batch_size=4,
        response_length=5,
        max_steps=2,
        output_dir=run,
        bf16=False,
        report_to="wandb",
    )
    assert out.count("Held-out prompts, PPO") == out.count("Written to") == 1
    assert steps_of(run) == [1, 2]
    assert json.loads((run / "summary.json").read_text())["initial_kl"] == 0
    assert json.loads((run / "settings.json").read_text())["processes"] == 2
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    logged = history(offline_records(run))
    assert [row["train/episode"] for row in logged if "train/episode" in row] == [8, 16]


def test_a_distillation_prints_and_writes_once(folders, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    run = tmp_path / "student"
    out = torchrun(
        "distill",
        model_name_or_path=folders / "policy",
        teacher_model_name_or_path=folders / "policy",
        train_data=data,
        eval_data=data,
        per_device_train_batch_size=2,
        response_length=5,
        max_steps=2,
        logging_steps=1,
        output_dir=run,
        bf16=False,
    )
    assert out.count("The student on held-out prompts") == out.count("Written to") == 1
    assert steps_of(run) == [1, 2]
    assert (run / "student" / "model.safetensors").is_file()
