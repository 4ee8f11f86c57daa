"""The evaluator: clustered errors, the same measurement for every cell, and what it writes."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlkl.sweep.evaluator import Evaluator, clustered

EVALUATION = {"prompts": 6, "responses_per_prompt": 3, "seed": 0, "samples": 2}
EVALUATION |= {"reference_samples": 32, "checkpoints": False}


@pytest.fixture
def settings(folders: Path) -> dict[str, Any]:
    """Tiny models and prompts in folders, as a recipe's settings name them."""
    classifier = str(folders / "classifier")
    return {
        "model_name_or_path": str(folders / "policy"),
        "ref_model_name_or_path": None,
        "reward_model": classifier,
        "positive_label": None,
        "reward_score": "log_odds",
        "reward_clamp": None,
        "judge_model": classifier,
        "eval_prompts": str(folders / "prompts.txt"),
        "response_length": 5,
        "temperature": 1.0,
        "max_steps": 2,
    }


def test_errors_are_those_of_the_prompts_means():
    """Ten equal responses to each of two prompts say no more than one."""
    values = torch.tensor([1.0] * 10 + [3.0] * 10)
    mean, stderr = clustered(values, 10)
    assert (mean, stderr) == (2.0, 1.0)
    naive = float(values.std() / 20**0.5)
    assert naive < 0.3


def test_the_reference_against_itself_has_no_kl_and_its_own_curves(settings):
    evaluator = Evaluator(settings, EVALUATION)
    point, samples = evaluator.point(evaluator.ref, 0)
    assert point["prompts"] == len(evaluator.prompts)
    assert point["kl"] == point["kl_k1"] == point["kl_se"] == 0
    assert point["reward"] == pytest.approx(point["judge"]), "the judge is the reward here"
    assert len(samples) == 2
    assert samples[0]["prompt"] == "the film"
    shares: list[float] = []
    reference = evaluator.reference(shares.append)
    assert shares == [1.0], "one batch has all"
    assert reference["optimal"][0]["reward"] > reference["reward"]
    assert [p["n"] for p in reference["best_of_n"]] == [1, 2, 4, 8, 16, 32]
    assert reference["best_of_n"][0]["reward"] == pytest.approx(reference["reward"], abs=1e-5)


def test_two_evaluations_of_a_policy_are_the_same(settings, make_lm, make_tokenizer):
    policy = make_lm(vocab_size=len(make_tokenizer(pad_is_eos=False)), seed=1)
    points = [Evaluator(settings, EVALUATION).point(policy, 1)[0] for _ in range(2)]
    assert points[0] == points[1]
    assert points[0]["kl"] > 0


def test_prompts_are_cut_as_in_training(settings, folders, make_lm):
    """Reward and judge read the prompt as it was written."""
    policy, points = make_lm(vocab_size=34, seed=1), []
    for prompt in ("the film " * 60 + "it is", "it is"):
        (folders / "prompts.txt").write_text(prompt + "\n")
        evaluator = Evaluator(settings | {"max_prompt_length": 2}, EVALUATION)
        point, _ = evaluator.point(policy, 0)
        points.append([point[name] for name in ("kl", "kl_k1", "length", "truncated")])
        assert len(evaluator.reference()["best_of_n"]) == 6
    assert points[0] == points[1]


def test_how_it_was_measured_tells_prompts_lengths_and_draws_apart(settings, folders):
    before = Evaluator(settings, EVALUATION).measured()
    assert (before["prompts"], before["temperature"], before["max_prompt_length"]) == (6, 1.0, None)
    for changed in (
        Evaluator(settings | {"max_prompt_length": 2}, EVALUATION),
        Evaluator(settings | {"response_length": 6}, EVALUATION),
        Evaluator(settings, EVALUATION | {"prompts": 4}),
        Evaluator(settings, EVALUATION | {"responses_per_prompt": 2}),
        Evaluator(settings, EVALUATION | {"seed": 1}),
    ):
        assert changed.measured() != before
    (folders / "prompts.txt").write_text("a superb plot\n" * 8)  # the same path, other prompts
    after = Evaluator(settings, EVALUATION).measured()
    assert {k for k in after if after[k] != before[k]} == {"prompts_sha256"}


@pytest.mark.parametrize("max_steps", [2, -1, None], ids=str)
def test_a_cell_is_measured_at_its_end_and_its_kept_checkpoints(
    settings, tmp_path, make_lm, max_steps
):
    """Of a run whose length epochs say (−1), or a recipe's default (None), too."""
    settings["max_steps"] = max_steps
    cell = tmp_path / "cell"
    for name, seed in (("checkpoint-1", 1), ("policy", 2)):
        make_lm(vocab_size=34, seed=seed).save_pretrained(cell / "run" / name)
    (cell / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    plan = {"recipe": "x.py", "settings": settings, "evaluation": EVALUATION}
    (cell / "cell.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-m", "rlkl.sweep.evaluator", str(cell)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((cell / "points.json").read_text())
    assert [point["step"] for point in record["points"]] == [1, 2]
    assert {"kl", "kl_se", "reward", "reward_se", "judge", "judge_se"} <= record["points"][0].keys()
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["measured"] == Evaluator(settings, EVALUATION).measured()
    assert not (cell / "run" / "checkpoint-1").exists()


def test_a_recipe_that_left_no_policy_is_named_and_trains_again(settings, tmp_path):
    """Code 0 and nothing to measure: a retry would otherwise measure the same nothing."""
    (tmp_path / "trained").touch()
    plan = {"recipe": "x.py", "settings": settings, "evaluation": EVALUATION}
    (tmp_path / "cell.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-m", "rlkl.sweep.evaluator", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "x.py ended with code 0 and left no policy" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "trained").exists()


def test_the_reference_says_how_far_it_is(settings, tmp_path):
    plan = {"recipe": None, "settings": settings, "evaluation": EVALUATION}
    (tmp_path / "cell.json").write_text(json.dumps(plan))
    (tmp_path / "progress").write_text("0.7")  # of an earlier attempt
    subprocess.run([sys.executable, "-m", "rlkl.sweep.evaluator", str(tmp_path)], check=True)
    assert float((tmp_path / "progress").read_text()) == 1.0
    assert "reference" in json.loads((tmp_path / "points.json").read_text())
