"""Two processes with half of each batch do what one does with the whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.run_in_processes import SETTINGS, TRL

SCRIPT = Path(__file__).with_name("run_in_processes.py")
CLOCKS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(*command: str) -> None:
    """Runs Python; its output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def outputs(
    tmp_path_factory, make_lm: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> tuple[Path, Path]:
    """What one process and two have left."""
    folder = tmp_path_factory.mktemp("processes")
    tokenizer = make_tokenizer(pad_is_eos=False)
    make_lm(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    start(str(SCRIPT), str(folder / "model"), str(folder / "one"))
    start(*TORCHRUN, str(SCRIPT), str(folder / "model"), str(folder / "two"))
    return folder / "one", folder / "two"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("setting", [*SETTINGS, *(name for name, *_ in TRL), "distill"])
def test_the_weights_are_those_of_one_process(outputs, setting):
    one, two = (torch.load(folder / setting / "weights.pt") for folder in outputs)
    assert one.keys() == two.keys()
    for module, weights in one.items():
        for name, weight in weights.items():
            torch.testing.assert_close(two[module][name], weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_all_stop_where_one_is_told_to_and_go_on_from_there(outputs, processes):
    folder = outputs[0].with_name(processes)
    whole, resumed = (torch.load(folder / name / "weights.pt") for name in ("epochs", "stopped"))
    for module, weights in whole.items():
        for name, weight in weights.items():
            assert torch.equal(resumed[module][name], weight), name


def test_processes_draw_apart_and_the_first_as_one_alone(outputs):
    one, two = (json.loads((folder / "epochs" / "draws.json").read_text()) for folder in outputs)
    assert two[0] == one[0]
    assert not [name for name in two[0] if two[0][name] == two[1][name]]


def test_processes_share_the_prompts_of_an_evaluation(outputs):
    one, two = (json.loads((folder / "epochs" / "answered.json").read_text()) for folder in outputs)
    assert len(one[0]) == 3
    assert [one[0][:1], one[0][1:]] == two


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_measurement_is_that_of_one_process_and_stands_once(outputs, setting):
    one, two = (lines(folder / setting / "metrics.jsonl") for folder in outputs)
    assert len(one) == len(two)
    compared = set()
    for before, after in zip(one, two, strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - CLOCKS:
            if not name.startswith(("time/", "eps")):
                assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-7), name
                compared.add(name)
    assert compared >= {"kl/rb_se", "val/advantage_std", "val/ess_fraction", "grad_norm", "episode"}
    assert {"eval_kl/rb", "eval_objective/scores"} <= one[0].keys()
    one, two = (
        sorted(
            (row["step"], row["prompt"]) for row in lines(folder / setting / "completions.jsonl")
        )
        for folder in outputs
    )
    assert one == two != []


@pytest.mark.parametrize("setting", [name for name, *_ in TRL])
def test_trls_trainers_measure_what_one_process_does(outputs, setting):
    one, two = (lines(folder / setting / "metrics.jsonl") for folder in outputs)
    for before, after in zip(one, two, strict=True):
        assert before.keys() == after.keys()
        if "kl/rb" in before:  # else the last record
            for name in ("kl/rb", "kl/rb_se", "kl/k1", "objective/scores", "reward", "grad_norm"):
                assert after[name] == pytest.approx(before[name], rel=1e-5), name


def test_a_distillations_log_is_the_mean_over_processes(outputs):
    one, two = (lines(folder / "distill" / "metrics.jsonl") for folder in outputs)
    for before, after in zip(one, two, strict=True):
        assert before.keys() == after.keys()
        if "grad_norm" in before:  # else the last record
            for name in ("loss", "grad_norm", "data/tokens"):
                assert after[name] == pytest.approx(before[name], rel=1e-6), name


def test_a_distillations_evaluation_is_that_of_all_texts_each_taken_once(outputs):
    one, two = (lines(folder / "distill" / "metrics.jsonl")[0] for folder in outputs)
    assert one.keys() == two.keys()
    given = [name for name in one if name.startswith("eval_") and "own/" not in name]
    assert {"eval_loss", "eval_divergence/rkl_se", "eval_gap/tail"} <= set(given)
    for name in given:
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    assert any(one[name] != two[name] for name in one if "own/" in name), "draws of its own"
