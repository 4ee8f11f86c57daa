"""DistillTrainer on the tiny model: what it computes, logs, refuses, and takes up again."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlkl.kl import DIVERGENCES, future_kl, kl_surrogate, reverse_kl
from rlkl.rl import leave_one_out_mean
from rlkl.trainers import DISTILL_VOCABULARY, DistillConfig, DistillTrainer


def whole_logits(model: torch.nn.Module, responses) -> Tensor:
    """[N, V] at the response tokens, the obvious way: one row at a time, without padding."""
    rows = []
    for i in range(len(responses)):
        row = responses.rows(torch.tensor([i]))
        logits = model(input_ids=row.input_ids).logits[:, :-1][:, -row.tokens.shape[1] :]
        rows.append(logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_is_that_of_the_mixed_loss_on_the_completions(
    name, make_distiller, pairs, flat_gradient
):
    trainer = make_distiller(loss=name, ce_weight=0.25, temperature=2.0)
    inputs = {column: pairs[column][:6] for column in pairs.column_names}
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    found = flat_gradient(trainer.model)

    responses = trainer.given(inputs)
    trainer.model.zero_grad()
    student = whole_logits(trainer.model, responses)
    with torch.no_grad():
        teacher = whole_logits(trainer.teacher, responses)
    value = DIVERGENCES[name](student, teacher, temperature=2.0).mean()
    tokens = responses.tokens[responses.mask]
    cross_entropy = torch.nn.functional.cross_entropy(student, tokens)
    expected = 0.75 * 4 * value + 0.25 * cross_entropy
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, flat_gradient(trainer.model), rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_settings_of_the_divergence_reach_the_loss(tmp_path):
    student, teacher = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))

    def value(**settings: Any) -> list[float]:
        config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
        return config.divergence()(student, teacher).tolist()

    assert value(loss="skew_fkl", skew_alpha=0.0) == pytest.approx(value(loss="fkl"))
    assert value(loss="skew_rkl", skew_alpha=0.0) == pytest.approx(value(loss="rkl"))
    assert value(loss="js", js_weight=0.0, js_scaled=True) == pytest.approx(value(loss="fkl"))
    assert value(loss="js", js_weight=1.0, js_scaled=True) == pytest.approx(value(loss="rkl"))
    assert value(loss="fkl_rkl", fkl_weight=0.0) == pytest.approx(value(loss="rkl"))
    assert value(loss="akl", head_mass=1.0) == pytest.approx(value(loss="fkl"))
    assert value(loss="akl_r", head_mass=1.0) == pytest.approx(value(loss="rkl"))
    assert value(loss="akl", head_rule="reach") != value(loss="akl")


def test_the_sequence_gradient_is_that_of_the_sequence_kl_less_a_baseline(
    make_distiller, pairs, flat_gradient
):
    settings = {"loss": "rkl", "on_policy_fraction": 1.0, "response_length": 5}
    gradients = {}
    for kind in ("token", "sequence"):
        trainer = make_distiller(on_policy_gradient=kind, **settings)
        responses, on_policy = trainer.responses(
            {"prompt": pairs["prompt"][:6]}, trainer._generator()
        )
        assert on_policy
        trainer.model.zero_grad()
        loss, _ = trainer.loss(responses, *trainer.hidden_states(responses), on_policy)
        loss.backward()
        gradients[kind] = flat_gradient(trainer.model)
    trainer.model.zero_grad()
    mask = responses.mask
    student = whole_logits(trainer.model, responses)
    with torch.no_grad():
        teacher = whole_logits(trainer.teacher, responses)
    index = responses.tokens[mask][:, None]
    k, logp = torch.zeros(mask.shape), torch.zeros(mask.shape)
    k = k.masked_scatter(mask, reverse_kl(student, teacher))
    logp = logp.masked_scatter(mask, student.log_softmax(-1).gather(1, index)[:, 0])
    surrogate = kl_surrogate(k, logp, mask, "both", own_token=False)
    baseline = leave_one_out_mean(future_kl(k, mask, own_token=False), mask)
    assert baseline.abs().max() > 0
    ((surrogate - (baseline * logp).sum(1)).sum() / mask.sum()).backward()
    torch.testing.assert_close(
        gradients["sequence"], flat_gradient(trainer.model), rtol=1e-3, atol=1e-4
    )
    assert (gradients["sequence"] - gradients["token"]).norm() > 0.1 * gradients["token"].norm()


@pytest.mark.parametrize("loss", ["rkl", "akl"])
def test_training_brings_the_student_to_its_teacher(loss, make_distiller, pairs):
    settings = {"max_steps": 25, "learning_rate": 1e-2, "logging_steps": 25}
    trainer = make_distiller(loss=loss, eval_dataset=pairs, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_divergence/fkl"] < 0.4 * before["eval_divergence/fkl"]
    assert after["eval_divergence/rkl"] < 0.4 * before["eval_divergence/rkl"]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(make_distiller, make_lm, steps):
    trainer = make_distiller(model=make_lm(seed=0), loss="akl", max_steps=1)
    trainer.train()
    (log,) = steps(trainer)
    assert all(log[f"divergence/{name}"] == 0 for name in DIVERGENCES)
    assert log["gap/head"] == log["gap/tail"] == log["loss"] == log["grad_norm"] == 0
    assert log["akl/forward_weight"] == 0.5


def test_every_divergence_is_logged_whatever_is_trained_and_agrees_with_the_loss(
    make_distiller, steps
):
    for name in ("fkl", "akl_r"):
        trainer = make_distiller(loss=name)
        trainer.train()
        log = steps(trainer)[0]
        assert {f"divergence/{n}" for n in DIVERGENCES} < set(log)
        assert log[f"divergence/{name}"] == pytest.approx(log["loss/divergence"], rel=1e-5)
        assert log["loss"] == pytest.approx(log["loss/divergence"], rel=1e-3)
        total = log["divergence/akl"] + log["divergence/akl_r"]
        assert total == pytest.approx(log["divergence/fkl"] + log["divergence/rkl"], rel=1e-5)


def test_every_logged_metric_is_in_the_vocabulary_and_in_the_file(make_distiller, tmp_path, steps):
    trainer = make_distiller(loss="js", ce_weight=0.1)
    trainer.train()
    for log in steps(trainer):
        means = {key.removesuffix("_se") for key in log} - {"step"}
        assert means <= set(DISTILL_VOCABULARY), means - set(DISTILL_VOCABULARY)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "divergence/akl" in line] == [1, 2]


def test_the_expensive_measurement_is_taken_on_logged_steps_only(make_distiller, monkeypatch):
    trainer = make_distiller(max_steps=5, logging_steps=2)
    measured = []
    original = trainer.measure
    monkeypatch.setattr(
        trainer,
        "measure",
        lambda *a: measured.append(trainer.state.global_step + 1) or original(*a),
    )
    trainer.train()
    assert measured == [2, 4, 5]


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"logging_steps": 3, "logging_first_step": True}, {1, 3, 5}),
        ({"logging_strategy": "epoch"}, {2, 4, 5}),  # the last by the end of training
        ({"logging_strategy": "epoch", "gradient_accumulation_steps": 2}, {1, 2, 3, 4, 5}),
        ({"logging_strategy": "no"}, {5}),
    ],
)
def test_every_logged_step_is_measured_and_no_other(
    settings, measured, make_distiller, monkeypatch, steps
):
    found, measure = set(), DistillTrainer.measure

    def noted(self, *arguments):
        found.add(self.state.global_step + 1)
        return measure(self, *arguments)

    monkeypatch.setattr(DistillTrainer, "measure", noted)
    trainer = make_distiller(max_steps=5, **settings)
    trainer.train()
    assert found == measured
    logged = {log["step"] for log in trainer.state.log_history if "loss" in log}
    assert {log["step"] for log in steps(trainer)} == logged | {5}


def test_cross_entropy_does_not_act_on_the_students_own_samples(make_distiller, steps):
    trainer = make_distiller(on_policy_fraction=1.0, ce_weight=0.9)
    trainer.train()
    assert all(log["loss/cross_entropy"] == 0 for log in steps(trainer))
    assert all(
        log["loss"] == pytest.approx(log["loss/divergence"], rel=1e-3) for log in steps(trainer)
    )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_stopped_run_goes_on_as_the_uninterrupted_one(
    accumulated, make_distiller, pairs, tmp_path
):
    settings = {
        "train_dataset": pairs.select(range(10)),  # two steps an epoch, or the second a half one
        "per_device_train_batch_size": 6 if accumulated == 1 else 4,
        "gradient_accumulation_steps": accumulated,
        "on_policy_fraction": 0.5,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make_distiller(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make_distiller(**settings, output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_lora_student_moves_its_adapter_alone(make_distiller, lora):
    trainer = make_distiller(peft_config=lora)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora" in name for name in moved)


def test_the_seed_fixes_where_an_adapter_starts(make_distiller, lora):
    starts = []
    for noise, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(noise)
        starts.append(make_distiller(peft_config=lora, seed=seed).model.state_dict())
    (same,) = {torch.equal(starts[0][name], starts[1][name]) for name in starts[0]}
    assert same
    assert any(not torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


@pytest.mark.parametrize("adapter", [False, True])
def test_a_teacher_that_is_the_student_is_refused(adapter, make_distiller, make_lm, lora):
    model = make_lm()
    with pytest.raises(ValueError, match=r"share the weights that are trained: .* a second time"):
        make_distiller(model=model, teacher_model=model, peft_config=lora if adapter else None)


def test_a_teacher_in_bfloat16_measures_about_the_same(make_distiller, make_lm, steps):
    logs = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_distiller(teacher_model=make_lm(seed=0).to(dtype), loss="fkl", max_steps=1)
        trainer.train()
        logs.append(steps(trainer)[0])
    assert logs[1]["divergence/fkl"] == pytest.approx(logs[0]["divergence/fkl"], rel=3e-2)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_student_and_teacher_may_be_of_different_families(on_policy, make_distiller, pairs):
    """A GPT-2 learns from a Gemma 2: rotary positions, a scaled embedding, soft-capped logits."""
    config = Gemma2Config(
        vocab_size=33,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        final_logit_softcapping=1.5,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Gemma2ForCausalLM(config).eval()
    trainer = make_distiller(teacher_model=teacher, loss="fkl", on_policy_fraction=on_policy)
    inputs = {column: pairs[column][:6] for column in pairs.column_names}
    responses, _ = trainer.responses(inputs, trainer._generator())
    _, parts = trainer.loss(responses, *trainer.hidden_states(responses), bool(on_policy))
    with torch.no_grad():
        logits = (whole_logits(model, responses) for model in (trainer.model, teacher))
        expected = float(DIVERGENCES["fkl"](*logits).mean())
    assert parts["loss/divergence"] == pytest.approx(expected, rel=1e-4)
    trainer.train()


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_a_head_padded_further_than_the_others_is_cut_in_loss_and_sampling(
    on_policy, make_distiller, make_lm, steps
):
    student, vocab = make_lm(seed=1), make_lm().config.vocab_size
    student.resize_token_embeddings(vocab + 31, mean_resizing=False)
    with torch.no_grad():
        student.lm_head.weight[vocab:] = 5 * student.lm_head.weight[:31]  # likely, if not cut
    trainer = make_distiller(model=student, on_policy_fraction=on_policy)
    trainer.train()
    assert trainer.vocab_size == vocab
    assert steps(trainer)[0]["divergence/fkl"] > 0


def test_accumulated_batches_give_the_mean_of_their_losses(make_distiller, pairs, steps):
    data = pairs.select(range(4))
    trainer = make_distiller(
        train_dataset=data,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    trainer.train()
    assert len(steps(trainer)) == 1
    log = steps(trainer)[0]
    assert log["loss"] == pytest.approx(log["loss/divergence"], rel=1e-3)


def test_evaluation_measures_held_out_text_and_on_demand_the_students_samples(
    make_distiller, pairs
):
    trainer = make_distiller(eval_dataset=pairs, eval_on_policy=True, response_length=5)
    metrics = trainer.evaluate()
    assert metrics == trainer.evaluate()
    for prefix in ("eval_", "eval_own/"):
        for name in ("divergence/fkl", "divergence/rkl_per_response", "student/nll_per_token"):
            assert math.isfinite(metrics[prefix + name])
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_divergence/akl"], rel=1e-5)


def test_the_held_out_loss_is_the_loss_that_is_trained(make_distiller, pairs):
    trainer = make_distiller(
        eval_dataset=pairs,
        loss="skew_fkl",
        skew_alpha=0.3,
        ce_weight=0.25,
        temperature=2.0,
        per_device_eval_batch_size=5,
    )
    responses = trainer.given({name: list(pairs[name]) for name in pairs.column_names})
    with torch.no_grad():
        student, teacher = (
            whole_logits(model, responses).double() for model in (trainer.model, trainer.teacher)
        )
    value = trainer.divergence(student, teacher, temperature=2.0).mean()
    tokens = responses.tokens[responses.mask]
    expected = 0.75 * 4 * value + 0.25 * torch.nn.functional.cross_entropy(student, tokens)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kl"}, "divergence 'kl' is unknown; use one of fkl"),
        ({"ce_weight": 1.5}, "ce_weight is 1.5; it must lie in"),
        ({"per_device_train_batch_size": -1}, "per_device_train_batch_size is -1; it must be at"),
        ({"max_steps": -5, "num_train_epochs": -1}, "make one of them positive"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be > 0"),
        ({"temperature": math.inf}, "temperature is inf; it must be > 0 and finite"),
        ({"sampling_temperature": math.inf}, "sampling_temperature is inf; it must be > 0"),
        ({"skew_alpha": 1.0}, "skew_alpha is 1.0"),
        ({"head_mass": 0.0}, "head_mass is 0.0"),
        ({"head_rule": "top"}, "head_rule is 'top'; use 'within' or 'reach'"),
        ({"on_policy_gradient": "both"}, "use 'token' or 'sequence'"),
        (
            {"on_policy_gradient": "sequence", "on_policy_fraction": 1.0},
            "with loss 'akl': the sequence-level gradient is that of D_KL",
        ),
        ({"on_policy_gradient": "sequence", "loss": "rkl"}, "set on_policy_fraction > 0"),
        (
            {
                "on_policy_gradient": "sequence",
                "loss": "rkl",
                "on_policy_fraction": 1.0,
                "temperature": 2.0,
            },
            "make them equal",
        ),
    ],
)
def test_impossible_settings_are_refused_with_their_remedy(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_wandb_gets_what_the_file_gets(make_distiller, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: list[dict[str, Any]] = []
    import wandb

    trainer = make_distiller(report_to=["wandb"])
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run, "log", lambda self, data, *a, **k: logged.append(data)
    )
    trainer.train()
    assert any("train/divergence/akl" in row for row in logged)
    assert list(Path(tmp_path / "run" / "wandb").glob("offline-run-*"))
