"""Whole steps of RLOO and GRPO: what is measured, from which reference, and what is left behind."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import RLOOTrainer

from reward_models import LexiconReward
from rlkl.trainers import VOCABULARY
from rlkl.trainers.metrics import described
from rlkl.trainers.trl import RaoBlackwellGRPOTrainer, RaoBlackwellRLOOTrainer
from tests.trainers.trl.cases import both_trainers


def steps(trainer):
    return [log for log in trainer.state.log_history if "kl/rb" in log]


@both_trainers
def test_the_kl_is_0_before_the_first_update_and_measured_after(make_trl_trainer, trainer_class):
    trainer = make_trl_trainer(trainer_class, max_steps=2)
    trainer.train()
    first, second = steps(trainer)
    assert [first[f"kl/{name}"] for name in ("k1", "k3", "rb")] == [0, 0, 0]
    assert second["kl/rb"] > 0
    assert second["kl"] == second["kl/rb_per_token"]
    assert second["kl_coef"] == trainer.args.beta == 0.1


@both_trainers
def test_dropout_is_off(make_trl_trainer, make_lm, trainer_class):
    dropping = make_lm(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    trainer = make_trl_trainer(trainer_class, model=dropping, max_steps=1)
    trainer.train()
    assert steps(trainer)[0]["kl/rb"] == 0


@both_trainers
def test_positions_count_real_tokens_only(make_trl_trainer, trainer_class):
    """A left-padded row says what it says alone; TRL's own pass does not (GPT-2)."""
    trainer = make_trl_trainer(trainer_class)
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9], [0, 4, 5, 6, 7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    together = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)[0]
    trainer._joint = None
    alone, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids[:1, 3:], mask[:1, 3:], 3
    )
    assert torch.allclose(together[:1], alone, atol=1e-5)
    if trainer_class is RaoBlackwellRLOOTrainer:
        theirs = RLOOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, mask, 3
        )
        assert not torch.allclose(theirs[0][:1], alone, atol=1e-3)


@both_trainers
def test_the_reference_is_the_policy_as_it_was_given(make_trl_trainer, make_lm, trainer_class):
    """Also one that no file holds; TRL loads the reference by the policy's name."""
    changed = make_lm()
    torch.nn.init.normal_(changed.transformer.h[0].mlp.c_fc.weight)
    trainer = make_trl_trainer(trainer_class, model=changed, max_steps=1, learning_rate=1e-2)
    before = {name: p.clone() for name, p in changed.named_parameters()}
    trainer.train()
    assert steps(trainer)[0]["kl/rb"] == 0
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert any(not torch.equal(p, before[name]) for name, p in changed.named_parameters())


@both_trainers
def test_the_references_own_forward_is_its_own(make_trl_trainer, trainer_class):
    """TRL puts a forward on the policy that a copy of it would share."""
    trainer = make_trl_trainer(trainer_class, max_steps=1, learning_rate=1e-2)
    ids = torch.tensor([[1, 2, 3]])
    before = trainer.ref_model(ids).logits.detach().clone()
    trainer.train()
    assert torch.equal(trainer.ref_model(ids).logits, before)


@both_trainers
def test_a_new_adapter_is_measured_from_the_model_without_it(make_trl_trainer, lora, trainer_class):
    trainer = make_trl_trainer(trainer_class, peft_config=lora, max_steps=2)
    trainer.train()
    first, second = steps(trainer)
    assert trainer.ref_model is None
    assert first["kl/rb"] == 0 < second["kl/rb"]


@both_trainers
def test_a_trained_adapter_is_measured_from_itself_as_it_came(
    make_trl_trainer, make_lm, lora, trainer_class
):
    policy = get_peft_model(make_lm(), lora)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer = make_trl_trainer(trainer_class, model=policy, max_steps=2)
    trainer.train()
    first, second = steps(trainer)
    assert first["kl/rb"] == 0 < second["kl/rb"]
    assert policy.active_adapter == "default"
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)


@both_trainers
def test_another_reference_is_measured_from(make_trl_trainer, make_lm, trainer_class):
    trainer = make_trl_trainer(trainer_class, ref_model=make_lm(seed=1), max_steps=1)
    trainer.train()
    assert steps(trainer)[0]["kl/rb"] > 0.1


@both_trainers
def test_a_penalty_holds_the_kl(make_trl_trainer, trainer_class):
    moved = []
    for beta in (0.0, 10.0):
        trainer = make_trl_trainer(trainer_class, beta=beta, max_steps=6, learning_rate=1e-2)
        trainer.train()
        moved.append(steps(trainer)[-1]["kl/rb"])
    assert moved[1] < moved[0] / 2


@both_trainers
def test_the_log_has_ppos_names_and_judges_and_goes_to_the_file(make_trl_trainer, trainer_class):
    judges = {"same": LexiconReward()}
    trainer = make_trl_trainer(trainer_class, judges=judges, max_steps=2)
    trainer.train()
    lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "kl/rb" in r]
    assert [r["step"] for r in records] == [1, 2]
    for record in records:
        assert record["judge/same"] == record["objective/scores"]
        assert record["objective/scores"] == pytest.approx(record["reward"], abs=1e-6)
        assert record["response/length"] == record["completions/mean_length"]
        assert record["response/truncated_fraction"] == record["completions/clipped_ratio"]
        ours = {name for name in record if name.split("/")[0] in ("kl", "objective", "policy")}
        assert len(ours - {"kl"}) >= 18
        assert all(described(name) for name in ours - {"kl"})
    assert "kl_coef" in VOCABULARY


@both_trainers
def test_rollouts_may_serve_several_updates_and_be_split(make_trl_trainer, trainer_class):
    trainer = make_trl_trainer(
        trainer_class, num_iterations=2, steps_per_generation=2, max_steps=4, learning_rate=1e-2
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert [log["step"] for log in steps(trainer)] == [1]  # one rollout of 16 for all four
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@both_trainers
def test_gradients_may_be_accumulated(make_trl_trainer, trainer_class):
    """Two halves leave the step that the whole leaves."""
    moved = []
    for size, halves in ((8, 1), (4, 2)):
        trainer = make_trl_trainer(
            trainer_class,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=halves,
            generation_batch_size=8,
            max_steps=2,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1e-2,
            **({"loss_type": "dr_grpo"} if trainer_class is RaoBlackwellGRPOTrainer else {}),
        )
        trainer.train()
        moved.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(*moved, atol=1e-5)


@both_trainers
def test_prompts_may_be_conversations(make_trl_trainer, tokenizer, trainer_class):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "the film is"}]] * 8})

    def length(prompts, completions, **columns):
        return [float(len(c[0]["content"])) for c in completions]

    trainer = make_trl_trainer(trainer_class, train_dataset=chats, reward_funcs=length, max_steps=1)
    trainer.train()
    assert steps(trainer)[0]["kl/rb"] == 0


@both_trainers
def test_an_evaluation_measures_the_same(make_trl_trainer, prompts, trainer_class):
    trainer = make_trl_trainer(
        trainer_class, eval_dataset=prompts, max_steps=1, per_device_eval_batch_size=8
    )
    trainer.train()
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert logged["eval_kl/rb"] > 0
    assert "eval_objective/scores" in logged
    assert "eval_loss" in metrics


def test_without_a_penalty_rloos_loss_is_trls(make_trl_trainer):
    trainer = make_trl_trainer(RaoBlackwellRLOOTrainer, beta=0.0)
    trainer.create_optimizer()
    trainer.model.train()
    batch = trainer._prepare_inputs([{"prompt": "the film is"}] * 8)
    ours = trainer._compute_loss(trainer.model, batch)
    trainer._get_per_token_logps_and_entropies = (
        RLOOTrainer._get_per_token_logps_and_entropies.__get__(trainer)
    )
    theirs = RLOOTrainer._compute_loss(trainer, trainer.model, batch)
    gradients = [
        torch.autograd.grad(loss, list(trainer.model.parameters())) for loss in (ours, theirs)
    ]
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


def test_a_lora_config_of_other_layers_is_taken(make_trl_trainer):
    config = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = make_trl_trainer(RaoBlackwellGRPOTrainer, peft_config=config, max_steps=1)
    trainer.train()
    assert steps(trainer)[0]["kl/rb"] == 0


@both_trainers
def test_a_checkpoint_with_all_steps_takes_no_more(make_trl_trainer, trainer_class):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trained = make_trl_trainer(trainer_class, **settings)
    trained.train()
    trainer = make_trl_trainer(trainer_class, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    for ours, theirs in zip(trainer.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not list(Path(trainer.args.output_dir).glob("**/README.md"))  # TRL's model card


@both_trainers
def test_there_must_be_a_checkpoint_to_go_on_from(make_trl_trainer, trainer_class):
    with pytest.raises(ValueError, match="holds no whole checkpoint to go on from"):
        make_trl_trainer(trainer_class).train(resume_from_checkpoint=True)


@both_trainers
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize(
    "settings",
    [{"suppress_tokens": list(range(5, 60))}, {"min_p": 0.9}, {"num_beams": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_policys_generation_config_leaves_the_sampler_alone(
    make_trl_trainer, make_lm, trainer_class, adapter, settings
):
    """generate takes from it what TRL's settings leave open, and nothing measures that policy."""
    drawn = []
    for given in ({}, settings):
        lm = make_lm()
        lm.generation_config.update(**given)
        config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True) if adapter else None
        trainer = make_trl_trainer(trainer_class, model=lm, peft_config=config, max_steps=2)
        batches = []
        trainer.with_kl = lambda batch, cost, then=trainer.with_kl, seen=batches: (
            seen.append(batch["completion_ids"]) or then(batch, cost)
        )
        trainer.train()
        drawn.append(batches)
        assert {name: getattr(lm.generation_config, name) for name in given} == given
    assert len(drawn[0]) == 2
    for expected, found in zip(*drawn, strict=True):
        assert torch.equal(found, expected)
