"""Whole steps: exact zeros at the first one, what is logged, what is trained and what is not."""

import json
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from reward_models import LexiconReward
from rlkl.models import load_causal_lm
from rlkl.trainers import VOCABULARY, PPOTrainer, RaoBlackwellPPOTrainer
from rlkl.trainers.metrics import average_steps, described

both_trainers = pytest.mark.parametrize("trainer_class", [PPOTrainer, RaoBlackwellPPOTrainer])


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- the first step -----------------------------------------------------------------------------


@both_trainers
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_mini_batches": 2},
        {"num_mini_batches": 2, "micro_batch_size": 2},
        {"num_generations": 2, "per_device_train_batch_size": 4, "temperature": 0.7},
        {"separate_value_model": True},
        {"bf16": True},
        {"lora": True},
        {"lora": True, "bf16": True, "num_mini_batches": 4},
        {"dropout": True},
        {"pad_is_eos": False},
        {"float64": True},
    ],
    ids=str,
)
def test_at_the_first_update_every_kl_is_zero_and_every_ratio_one(
    make_trainer, make_lm, make_tokenizer, lora, steps, trainer_class, changes
):
    changes = dict(changes)
    model = make_lm(vocab_size=34)
    if changes.pop("dropout", False):
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)
        model = make_lm(vocab_size=34, **dropout).train()
    if changes.pop("float64", False):
        model = model.double()
    if changes.pop("lora", False):
        changes["peft_config"] = lora
    tokenizer = make_tokenizer(pad_is_eos=changes.pop("pad_is_eos", True))
    trainer = make_trainer(
        trainer_class, model=model, processing_class=tokenizer, max_steps=1, **changes
    )
    trainer.train()
    (first,) = steps(trainer)
    zero = [name for name in first if name.startswith("kl/") or name == "objective/kl"]
    assert len(zero) == 13
    assert {name: first[name] for name in zero} == dict.fromkeys(zero, 0.0)
    assert first["val/first_ratio_error"] == 0.0


def test_a_reference_that_is_another_model_is_seen_at_the_first_step(make_trainer, make_lm, steps):
    trainer = make_trainer(ref_model=make_lm(seed=1), max_steps=1)
    trainer.train()
    (first,) = steps(trainer)
    assert first["kl/rb"] > 1
    assert first["val/first_ratio_error"] == 0.0


@both_trainers
def test_without_penalty_the_kl_is_measured_all_the_same(make_trainer, steps, trainer_class):
    trainer = make_trainer(trainer_class, kl_coef=0.0)
    trainer.train()
    second = steps(trainer)[1]
    assert second["kl/rb"] > 0
    assert second["kl/k1"] != 0
    assert second["objective/non_score_reward"] == 0
    assert second["loss/kl_avg"] == 0


# --- what is learned ----------------------------------------------------------------------------


@both_trainers
def test_training_raises_the_score(make_trainer, steps, trainer_class):
    trainer = make_trainer(
        trainer_class, max_steps=16, num_generations=4, kl_coef=0.01, learning_rate=1e-2
    )
    trainer.train()
    scores = [step["objective/scores"] for step in steps(trainer)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1


def test_a_strong_penalty_holds_the_kl(make_trainer, steps):
    ends = {}
    for kl_coef in (0.0, 10.0):
        trainer = make_trainer(RaoBlackwellPPOTrainer, max_steps=8, kl_coef=kl_coef)
        trainer.train()
        ends[kl_coef] = steps(trainer)[-1]["kl/rb"]
    assert ends[10.0] < 0.5 * ends[0.0]


def test_policy_and_critic_are_trained_and_the_reference_is_not(make_trainer):
    trainer = make_trainer()
    policy, ref = state_of(trainer.model), state_of(trainer.ref_model)
    trainer.train()
    assert any(not torch.equal(v, policy[k]) for k, v in trainer.model.state_dict().items())
    assert all(torch.equal(v, ref[k]) for k, v in trainer.ref_model.state_dict().items())
    assert trainer.critic.head.weight.any()


def test_a_separate_value_model_is_trained_and_leaves_the_policy_its_own_gradient(make_trainer):
    """With scores of zero nothing but the value loss moves: the policy must stay where it is."""

    def ones(prompts, texts):
        return torch.ones(len(texts))

    pure = {"kl_coef": 0.0, "whiten_advantages": True, "reward_funcs": ones, "lam": 1.0}
    trainer = make_trainer(separate_value_model=True, max_steps=1, num_ppo_epochs=1, **pure)
    trainer.critic.head.weight.data.fill_(0.1)
    trunk = state_of(trainer.critic.trunk)
    trainer.train()
    moved = [
        k for k, v in trainer.critic.trunk.state_dict().items() if not torch.equal(v, trunk[k])
    ]
    assert moved
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert not own & {p.data_ptr() for p in trainer.critic.parameters()}


def test_scores_that_are_all_equal_teach_nothing(make_trainer):
    """Advantages without spread must not be blown up by whitening them."""

    def same(prompts, texts):
        return torch.full((len(texts),), 0.1)

    trainer = make_trainer(
        reward_funcs=same, kl_coef=0.0, vf_coef=0.0, lam=1.0, max_steps=1, num_ppo_epochs=1
    )
    policy = state_of(trainer.model)
    trainer.create_optimizer()
    trainer.training_step(
        trainer.model, {"columns": {"prompt": ["the film", "it", "a plot", "so"]}}
    )
    largest = max(float(p.grad.abs().max()) for p in trainer.model.parameters())
    assert largest < 1e-6
    assert all(torch.equal(v, policy[k]) for k, v in trainer.model.state_dict().items())


def test_responses_that_do_not_end_pay_the_penalty(make_trainer, steps):
    def zero(prompts, texts):
        return torch.zeros(len(texts))

    trainer = make_trainer(
        reward_funcs=zero, missing_eos_penalty=3.0, max_steps=1, whiten_advantages=False
    )
    trainer.train()
    (first,) = steps(trainer)
    assert first["objective/scores"] == 0
    expected = -3.0 * first["response/truncated_fraction"]
    assert first["objective/rlhf_reward"] == pytest.approx(expected)
    assert expected < 0


@both_trainers
def test_an_adapter_is_all_that_is_trained_and_reloads(
    make_trainer, make_lm, lora, tmp_path, trainer_class
):
    trainer = make_trainer(trainer_class, peft_config=lora, learning_rate=1e-2)
    assert trainer.ref_model is None
    before = state_of(trainer.model)
    trainer.train()
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora" in name for name in changed)
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(make_lm(), tmp_path / "adapter").eval()
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(reloaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_policy_that_comes_with_its_adapter_is_trained_alike(make_trainer, make_lm, lora, steps):
    trainer = make_trainer(model=get_peft_model(make_lm(), lora), max_steps=1)
    assert trainer.ref_model is None
    trainer.train()
    assert steps(trainer)[0]["kl/rb"] == 0


def test_a_saved_policy_loads_as_any_model(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    loaded = load_causal_lm(tmp_path / "policy")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert (tmp_path / "policy" / "tokenizer.json").is_file()


def test_columns_that_are_not_read_may_hold_anything(make_trainer, prompts):
    others = {"input_ids": [[1]] * len(prompts), "labels": [None] * len(prompts)}
    trainer = make_trainer(train_dataset=Dataset.from_dict({**prompts.to_dict(), **others}))
    trainer.train()
    assert trainer.state.global_step == 2


# --- what is logged -----------------------------------------------------------------------------

SUMMARY = {  # of the Trainer, at the end of a run
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
}


def records(folder) -> list[dict]:
    """Lines of metrics.jsonl, read as JSON proper: NaN and Infinity are no numbers there."""

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_every_metric_that_is_logged_is_in_the_vocabulary_and_the_other_way_round(
    make_trainer, tmp_path, prompts
):
    trainer = make_trainer(
        RaoBlackwellPPOTrainer, judges={"lexicon": LexiconReward()}, eval_dataset=prompts
    )
    trainer.train()
    trainer.evaluate()
    logged = {k for record in records(tmp_path / "run") for k in record} - SUMMARY - {"step"}
    assert sorted(name for name in logged if described(name) is None) == []
    assert {"judge/lexicon", "judge/lexicon_se", "eval_judge/lexicon"} <= logged
    assert sorted(set(VOCABULARY) - {"judge/*"} - logged) == []


def test_every_step_reports_standard_errors_and_the_time_of_its_parts(make_trainer, steps):
    trainer = make_trainer()
    trainer.train()
    for step in steps(trainer):
        for name in ("kl/k1", "kl/k3", "kl/rb", "objective/scores", "policy/entropy_per_token"):
            assert step[f"{name}_se"] >= 0
        parts = [step[f"time/{p}"] for p in ("generation", "statistics", "scoring", "optimisation")]
        assert 0 < sum(parts) <= step["time/step"]
        assert step["eps"] == pytest.approx(8 / step["time/step"])
        assert step["val/num_eos_tokens"] == 8 * (1 - step["response/truncated_fraction"])
        assert step["objective/entropy_se"] >= 0
        assert step["val/ratio_var"] >= 0
        assert 0 < step["val/ratio"] < 10


def test_metrics_are_valid_json_even_of_a_single_response(make_trainer, tmp_path, prompts):
    """One response has no standard error, and equal returns no explained variance."""
    trainer = make_trainer(per_device_train_batch_size=1, max_steps=2, response_length=1)
    trainer.train()
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines if "kl/rb" in line] == [1, 2]
    assert lines[0]["kl/rb_se"] is None
    assert lines[0]["val/explained_variance"] is None


def test_steps_between_two_logs_are_averaged(make_trainer, steps):
    every, pairs = make_trainer(max_steps=4), make_trainer(max_steps=4, logging_steps=2)
    every.train()
    pairs.train()
    single, averaged = steps(every), steps(pairs)
    assert len(averaged) == 2
    expected = average_steps(single[2:])
    for name in ("kl/rb", "kl/rb_se", "objective/scores", "policy/approxkl_avg", "episode"):
        assert averaged[1][name] == pytest.approx(expected[name])
    assert averaged[1]["episode"] == 32


@pytest.mark.parametrize(("drop_last", "episodes"), [(True, [16, 32, 48]), (False, [16, 24, 40])])
def test_episodes_are_the_responses_that_were_sampled(make_trainer, steps, drop_last, episodes):
    """Of 12 prompts a second batch of 8 has 4."""
    sampled = []

    def reward(prompts, texts):
        sampled.append(len(texts))
        return torch.zeros(len(texts))

    trainer = make_trainer(
        reward_funcs=reward, dataloader_drop_last=drop_last, num_generations=2, max_steps=3
    )
    trainer.train()
    assert [step["episode"] for step in steps(trainer)] == episodes
    assert [sum(sampled[:n]) for n in (1, 2, 3)] == episodes


def test_completions_are_written_with_scores_and_kl(make_trainer, tmp_path):
    trainer = make_trainer(
        max_steps=3,
        log_completions_steps=2,
        num_completions=3,
        judges={"lexicon": LexiconReward()},
    )
    trainer.train()
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 1, 1, 3, 3, 3]
    for row in rows:
        assert row["score"] == float(LexiconReward()([row["prompt"]], [row["response"]]))
        assert row["judge/lexicon"] == row["score"]
    assert all(row["kl/rb"] == 0 for row in rows[:3])
    assert all(row["kl/rb"] > 0 for row in rows[3:])


def test_evaluation_is_the_same_at_every_call_and_disturbs_no_training(
    make_trainer, prompts, steps
):
    alone, evaluated = make_trainer(max_steps=2), make_trainer(max_steps=2, eval_dataset=prompts)
    alone.train()
    before = evaluated.evaluate()
    assert evaluated.evaluate() == before
    assert before["eval_kl/rb"] == 0
    evaluated.train()
    assert evaluated.evaluate()["eval_kl/rb"] > 0
    assert evaluated.evaluate(Dataset.from_dict({"prompt": ["it"] * 4}))["eval_response/length"] > 0
    for ours, theirs in zip(steps(alone), steps(evaluated), strict=True):
        assert ours["objective/scores"] == theirs["objective/scores"]
        assert ours["kl/rb"] == theirs["kl/rb"]


def test_several_evaluation_sets_are_measured_each_under_its_name(make_trainer, prompts):
    sets = {"short": Dataset.from_dict({"prompt": ["it"] * 4}), "all_of_it": prompts}
    trainer = make_trainer(eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    last = {name: value for log in trainer.state.log_history[-3:] for name, value in log.items()}
    for name, data in sets.items():
        alone = trainer.evaluate(data)
        ours = {k: last[k.replace("eval_", f"eval_{name}_")] for k in alone}
        assert ours == alone
    metrics = trainer.evaluate()
    assert sorted(name for name in metrics if described(name) is None) == []
    assert described("eval_all_of_it_kl/rb_se") == described("kl/rb_se")


def test_an_evaluation_samples_as_many_responses_to_a_prompt_as_training(make_trainer, prompts):
    scored = []

    def reward(prompts: list[str], responses: list[str]) -> torch.Tensor:
        scored.extend(prompts)
        return torch.zeros(len(responses))

    make_trainer(num_generations=3, reward_funcs=reward).evaluate(prompts.select([0, 1]))
    assert scored == [prompts[i]["prompt"] for i in (0, 0, 0, 1, 1, 1)]


def test_the_best_model_comes_back_with_its_critic(make_trainer, prompts, tmp_path):
    trainer = make_trainer(
        max_steps=3,
        eval_dataset=prompts,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="kl/rb",
        greater_is_better=False,
    )
    trainer.train()
    best = tmp_path / "run" / "checkpoint-1"  # the nearest to the start
    assert trainer.state.best_model_checkpoint == str(best)
    saved = load_file(best / "critic.safetensors")
    assert all(torch.equal(value, saved[k]) for k, value in trainer.critic.state_dict().items())


def test_no_largest_gradient_is_no_clipping(make_trainer):
    weights = []
    for largest in (None, 0.0, 1e-3):
        trainer = make_trainer(max_grad_norm=largest, max_steps=1)
        trainer.train()
        weights.append(trainer.critic.head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_evaluation_before_training_stays_in_the_metrics(make_trainer, prompts, tmp_path):
    trainer = make_trainer(max_steps=1, eval_dataset=prompts)
    trainer.evaluate()
    trainer.train()
    assert [r["step"] for r in records(tmp_path / "run") if "eval_kl/rb" in r] == [0]


def test_equal_seeds_give_equal_runs_and_others_do_not(make_trainer):
    weights = []
    for seed in (1, 1, 2):
        trainer = make_trainer(seed=seed)
        trainer.train()
        weights.append(trainer.model.lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_seeds_differ_by_what_is_sampled_and_not_by_the_order_of_prompts_alone(make_trainer):
    equal, seen = Dataset.from_dict({"prompt": ["the film is"] * 16}), []

    def reward(prompts: list[str], responses: list[str]) -> torch.Tensor:
        seen.append(tuple(responses))
        return torch.zeros(len(responses))

    for seed in (0, 1, 2**31):
        trainer = make_trainer(seed=seed, train_dataset=equal, reward_funcs=reward, max_steps=2)
        trainer.train()
    assert len(seen) == len(set(seen)) == 6  # two steps of three seeds


def test_the_seed_fixes_the_start_of_an_adapter(make_trainer, lora):
    starts = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        trainer = make_trainer(peft_config=lora)
        starts.append(state_of(trainer.model))
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_an_adapter_with_dropout_on_the_head_trains(make_trainer, make_lm):
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", lora_dropout=0.5)
    trainer = make_trainer(model=make_lm(tie_word_embeddings=False), peft_config=lora)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_critic_that_is_to_stay_as_it_is_stays(make_trainer):
    trainer = make_trainer(value_learning_rate=0.0)
    before = state_of(trainer.critic)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in state_of(trainer.critic).items())


def test_minibatches_are_shuffled_where_their_generator_is(make_trainer, monkeypatch):
    """A generator of a GPU draws on that GPU alone."""
    randperm, used = torch.randperm, []

    def on_its_device(n: int, *, generator: torch.Generator, **where: Any) -> torch.Tensor:
        used.extend(device == generator.device for device in where.values())
        return randperm(n, generator=generator, **where)

    monkeypatch.setattr("torch.randperm", on_its_device)
    make_trainer(num_mini_batches=2, max_steps=1).train()
    assert used == [True]  # of the second epoch; the sampler of the prompts names no device


def test_averaging_adds_standard_errors_in_squares():
    merged = average_steps(
        [{"x": 1.0, "x_se": 3.0, "episode": 8}, {"x": 3.0, "x_se": 4.0, "episode": 16}]
    )
    assert merged == {"x": 2.0, "x_se": 2.5, "episode": 16}


@pytest.mark.parametrize("kl_off_policy", ["prefix", "prefix_truncated"])
def test_later_updates_by_prefix_weights_log_how_much_the_weights_say(
    make_trainer, steps, kl_off_policy
):
    settings = {"kl_estimator": "rb", "kl_placement": "both", "num_ppo_epochs": 3, "max_steps": 2}
    trainer = make_trainer(kl_off_policy=kl_off_policy, learning_rate=1e-2, **settings)
    trainer.train()
    for log in steps(trainer):
        assert 0 < log["val/ess_fraction"] < 1
        assert 0 <= log["val/truncated_fraction"] < 1
        assert log["val/first_ratio_error"] == 0


def test_one_update_of_a_rollout_has_every_weight_one(make_trainer, steps):
    trainer = make_trainer(num_ppo_epochs=1, max_steps=1)
    trainer.train()
    (log,) = steps(trainer)
    assert log["val/ess_fraction"] == 1
    assert log["val/truncated_fraction"] == 0


def test_no_more_responses_are_sampled_together_than_is_said(make_trainer, make_lm, prompts):
    model, together = make_lm(), set()

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not None:  # sampling
            together.add(len(kwargs["input_ids"]))

    trainer = make_trainer(
        model=model, local_rollout_forward_batch_size=3, max_steps=1, eval_dataset=prompts
    )
    model.transformer.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert together == {3, 2}  # of 8 responses
    together.clear()
    trainer.evaluate()
    assert together == {3}  # of 12
