"""A student on held-out prompts: what is measured on which texts, and with what."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlkl.evaluation.judge import Judgement, Verdict
from rlkl.evaluation.student import evaluate_student
from rlkl.rollout import divergence_statistics, given_responses, summarise_divergences

PROMPTS = ["the film is", "a plot", "it was"]
COMPLETIONS = ["very good", "", "so dull"]


@pytest.fixture
def models(make_lm):
    return make_lm(seed=1), make_lm(seed=0)


def test_references_are_measured_where_they_are_and_samples_everywhere(models, tokenizer):
    student, teacher = models
    evaluation = evaluate_student(student, teacher, tokenizer, PROMPTS, COMPLETIONS, 6)
    metrics = evaluation.metrics
    given = given_responses(
        tokenizer, [PROMPTS[0], PROMPTS[2]], [COMPLETIONS[0], COMPLETIONS[2]], 6
    )
    expected = summarise_divergences(divergence_statistics(student, teacher, given))
    for name, value in expected.items():
        assert metrics[f"held_out/{name}"] == pytest.approx(value, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected["student/nll_per_token"]))
    assert metrics["rouge_l_n"] == 2
    assert len(evaluation.samples) == 3
    own = summarise_divergences(divergence_statistics(student, teacher, evaluation.samples))
    assert metrics["own/divergence/rkl_per_response"] == pytest.approx(
        own["divergence/rkl_per_response"], rel=1e-5
    )
    assert 0 < metrics["distinct_2"] <= 1
    assert 0 <= metrics["self_bleu"] <= 100


def test_the_head_of_the_adaptive_divergence_is_the_one_asked_for(models, tokenizer):
    student, teacher = models
    data = (tokenizer, PROMPTS, COMPLETIONS, 6)
    head = {"head_mass": 0.9, "head_rule": "reach"}
    evaluation = evaluate_student(student, teacher, *data, **head)
    expected = summarise_divergences(
        divergence_statistics(student, teacher, evaluation.samples, **head)
    )
    for name in ("divergence/akl", "gap/head"):
        assert evaluation.metrics[f"own/{name}"] == pytest.approx(expected[name], rel=1e-5)
        default = evaluate_student(student, teacher, *data).metrics[f"own/{name}"]
        assert default != pytest.approx(expected[name], rel=1e-3)


def test_the_seed_fixes_the_draws_and_the_mode_is_given_back(models, tokenizer):
    student, teacher = models
    student.train()
    teacher.train()
    arguments = (student, teacher, tokenizer, PROMPTS, COMPLETIONS, 6)
    first = evaluate_student(*arguments, seed=3)
    assert first.samples.texts == evaluate_student(*arguments, seed=3).samples.texts
    assert first.samples.texts != evaluate_student(*arguments, seed=4).samples.texts
    assert student.training
    assert teacher.training


def test_a_student_that_is_its_teacher_is_at_no_distance(models, tokenizer):
    student, teacher = models
    student.load_state_dict(teacher.state_dict())
    teacher.train()  # its dropout would be a distance
    metrics = evaluate_student(student, teacher, tokenizer, PROMPTS, COMPLETIONS, 6).metrics
    assert metrics["held_out/divergence/fkl"] == metrics["own/divergence/rkl_per_response"] == 0


@pytest.mark.parametrize("teacher", ["the base with the adapter in it", "its modules"])
def test_a_teacher_that_is_the_student_by_another_name_is_refused(make_lm, tokenizer, teacher):
    """Both KLs would be 0, whatever the student is."""
    base = make_lm()
    if teacher == "its modules":
        student, other = base, copy.copy(base)
    else:
        lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
        student, other = get_peft_model(base, lora).requires_grad_(False), base
    for models in ((student, other), (other, student)):
        with pytest.raises(ValueError, match=r"model and teacher share .* load it a second time"):
            evaluate_student(*models, tokenizer, PROMPTS, COMPLETIONS, 6)
    metrics = evaluate_student(student, student, tokenizer, PROMPTS, COMPLETIONS, 6).metrics
    assert metrics["own/divergence/rkl_per_response"] == 0


def test_the_expected_reverse_kl_on_own_samples_is_the_sequence_kl(models, tokenizer):
    """Σ_t D_t and Σ_t log-ratio have the same expectation on the student's samples."""
    student, teacher = models
    evaluation = evaluate_student(student, teacher, tokenizer, PROMPTS * 60, [""] * 180, 3)
    record = divergence_statistics(student, teacher, evaluation.samples)
    exact = record.divergences["rkl"].sum(1)
    sampled = (record.student_logp - record.teacher_logp).sum(1)
    difference = exact - sampled
    # Zero in expectation: within four standard errors of its mean.
    assert difference.mean().abs() < 4 * difference.std() / len(difference) ** 0.5


class FixedJudge:
    """Gives what it was told, and keeps what it was asked."""

    def __init__(self, verdicts):
        self.verdicts, self.asked = verdicts, []

    def __call__(self, prompts, responses, on_verdict=None):
        self.asked += zip(prompts, responses, strict=True)
        return Judgement(self.verdicts)


def test_the_judge_scores_the_samples_and_its_failures_are_counted(models, tokenizer):
    judge = FixedJudge([Verdict("1", 8, 2), None, Verdict("2", 6, 4)])
    evaluation = evaluate_student(*models, tokenizer, PROMPTS, COMPLETIONS, 6, judge=judge)
    assert [response for _, response in judge.asked] == evaluation.samples.texts
    assert evaluation.metrics["judge/quality"] == 7
    assert evaluation.metrics["judge/diversity"] == 3
    assert evaluation.metrics["judge/failed"] == 1
    judge = FixedJudge([None] * 3)
    metrics = evaluate_student(*models, tokenizer, PROMPTS, COMPLETIONS, 6, judge=judge).metrics
    assert metrics["judge/failed"] == 3
    assert "judge/quality" not in metrics


def test_prompts_without_any_reference_are_sampled_from_alone(models, tokenizer):
    metrics = evaluate_student(*models, tokenizer, PROMPTS, [""] * 3, 6).metrics
    assert not [name for name in metrics if name.startswith(("held_out", "rouge", "perplexity"))]
    assert torch.tensor(metrics["own/divergence/fkl"]).isfinite()
