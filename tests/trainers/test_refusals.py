"""What cannot work is refused before anything runs, in one line that names the remedy."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig, get_peft_model

from reward_models import LexiconReward
from rlkl.trainers import PPOTrainer, RaoBlackwellPPOTrainer

CHAT = [{"role": "user", "content": "hi"}]


def data(*prompts: str | None) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


@pytest.mark.parametrize(
    ("estimator", "placement", "remedy"),
    [
        ("rb", "reward", "placement 'both'"),
        ("rb", "loss", "placement 'both'"),
        ("k1", "loss", "placement 'reward' or placement 'both'"),
        ("k3", "loss", "placement 'both'"),
        ("k3", "reward", "placement 'both'"),
        ("k2", "reward", "estimator 'rb' with placement 'both'"),
        ("k2", "loss", "estimator 'rb' with placement 'both'"),
    ],
)
@pytest.mark.parametrize("trainer_class", [PPOTrainer, RaoBlackwellPPOTrainer])
def test_a_wrong_pair_is_refused_with_its_remedy_unless_allowed(
    make_trainer, trainer_class, estimator, placement, remedy
):
    pair = {"kl_estimator": estimator, "kl_placement": placement}
    with pytest.raises(ValueError, match=f"use {remedy}") as error:
        make_trainer(trainer_class, **pair)
    assert "allow_biased_kl=True" in str(error.value)
    assert "\n" not in str(error.value)
    trainer = make_trainer(trainer_class, **pair, allow_biased_kl=True, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("estimator", "placement"), [("k1", "reward"), ("k1", "both"), ("k3", "both"), ("rb", "both")]
)
def test_a_right_pair_trains_in_either_trainer(make_trainer, steps, estimator, placement):
    trainer = make_trainer(kl_estimator=estimator, kl_placement=placement)
    trainer.train()
    assert (steps(trainer)[1]["loss/kl_avg"] != 0) == (placement == "both")


def test_an_estimator_that_does_not_fit_the_default_placement_is_refused(make_trainer):
    with pytest.raises(ValueError, match="placement 'both'"):
        make_trainer(PPOTrainer, kl_estimator="rb")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kl_estimator": "k4"}, "estimator 'k4' is unknown; use one of k1, k2, k3, rb"),
        (
            {"kl_estimator": "topk", "kl_placement": "both"},
            "kl_estimator is topk, which is for measuring: train with rb",
        ),
        ({"kl_placement": "here"}, "placement 'here' is unknown; use 'reward', 'loss' or 'both'"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1; it must be >= 0"),
        ({"kl_coef": float("nan")}, "kl_coef is nan; it must be >= 0 and finite"),
        ({"kl_coef": float("inf")}, "kl_coef is inf; it must be >= 0 and finite"),
        ({"temperature": float("inf")}, "temperature is inf; it must be finite"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be > 0"),
        ({"cliprange": float("nan")}, "cliprange is nan; it must be > 0"),
        ({"vf_coef": float("nan")}, "vf_coef is nan; it must be >= 0 and finite"),
        ({"value_learning_rate": float("inf")}, "value_learning_rate is inf; it must be >= 0 and"),
        ({"kl_weight_bound": float("nan")}, "kl_weight_bound is nan; it must be at least 1"),
        ({"max_steps": 0}, "max_steps is 0 .* nothing would be trained; make one of them positive"),
        ({"response_length": 0}, "response_length is 0; it must be > 0"),
        ({"num_mini_batches": 3}, "8 responses per step .* do not divide into num_mini_batches=3"),
        (
            {"micro_batch_size": 3},
            "minibatches of 8 responses do not divide into micro_batch_size=3",
        ),
        ({"num_mini_batches": 2, "micro_batch_size": 8}, "minibatches of 4 responses"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"gradient_accumulation_steps": 2}, "set micro_batch_size"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0; it must be at least 1"),
        ({"num_completions": 0}, "num_completions is 0; it must be at least 1"),
        ({"gamma": 3.0}, r"gamma is 3.0; it must lie in \[0, 1\]"),
        ({"lam": -1.0}, "lam is -1.0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0; it must be >= 0"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha has no effect"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect"),
        ({"fp16": True}, "use bf16"),
        ({"metric_for_best_model": "loss"}, "set it to objective/scores"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "needs initial > 0"),
        ({"kl_target": -1.0}, "target is -1.0"),
        ({"kl_target": 6.0, "kl_horizon": 1.0}, "horizon"),
        ({"per_device_train_batch_size": 64}, "12 prompts for per_device_train_batch_size=64"),
        ({"train_dataset": data(*["it"] * 8, " ")}, "train_dataset: prompt 8 is empty"),
        ({"train_dataset": data(*["it"] * 8, None)}, "train_dataset: prompt 8 is no text but None"),
        ({"train_dataset": Dataset.from_dict({"prompt": [CHAT] * 8})}, "apply_chat_template"),
        ({"eval_dataset": data()}, "eval_dataset has no prompts: give it at least 1"),
        ({"eval_dataset": data("it", None)}, "eval_dataset: prompt 1 is no text but None"),
        ({"train_dataset": Dataset.from_dict({"text": ["it"] * 8})}, "'prompt' column is needed"),
        ({"train_dataset": data(*["it"] * 300, "it " * 60)}, "rows 256 to 300: .* 66 tokens"),
        ({"train_dataset": [{"prompt": "it"}] * 8}, r"train_dataset is of type list.*from_list"),
        ({"train_dataset": data("it").to_iterable_dataset()}, "of type IterableDataset"),
        (
            {"eval_dataset": Dataset.from_dict({"text": ["it"]})},
            "is needed; eval_dataset has",
        ),
        ({"eval_dataset": data("it " * 60)}, "eval_dataset, rows 0 to 0: .* 66 tokens"),
        (
            {"eval_dataset": {"own": data("it"), "far": data(" ")}},
            "'far': prompt 0 is empty",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) and len(str(value)) < 60 else "",
)
def test_settings_that_cannot_work_are_refused_in_one_line(make_trainer, changes, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        make_trainer(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "reference", ["the policy", "its modules", "the base that gets the adapter", "the adapted base"]
)
def test_a_reference_that_moves_with_the_policy_is_refused(make_trainer, make_lm, lora, reference):
    """It would give KL 0 at every step, however far the policy goes."""
    base = make_lm()
    model, ref_model, own = base, base, {}
    if reference == "its modules":
        ref_model = make_lm(seed=1)
        ref_model.transformer, ref_model.lm_head = base.transformer, base.lm_head
    elif reference == "the base that gets the adapter":
        own = {"peft_config": lora}
    elif reference != "the policy":
        model = get_peft_model(base, lora)
    with pytest.raises(ValueError, match=r"ref_model share the weights .* leave it out"):
        make_trainer(model=model, ref_model=ref_model, **own)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_its_bases_biases_needs_a_reference(
    make_trainer, make_lm, lora, bias
):
    """They stay on when the adapter is off, so that its KL would be too small."""
    lora.bias = bias
    with pytest.raises(ValueError, match="use bias='none', or pass a ref_model"):
        make_trainer(peft_config=lora)
    assert make_trainer(peft_config=lora, ref_model=make_lm()).ref_model is not None


def test_weights_that_are_unfrozen_later_are_seen_before_they_are_trained(
    make_trainer, make_lm, lora
):
    adapted = make_trainer(peft_config=lora)
    adapted.model.get_base_model().transformer.wpe.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trained beside its adapter .*wpe"):
        adapted.train()
    model, ref_model = make_lm(), make_lm()
    model.transformer.wpe.requires_grad_(False)
    ref_model.transformer.wpe = model.transformer.wpe
    shared = make_trainer(model=model, ref_model=ref_model)
    model.transformer.wpe.requires_grad_(True)
    with pytest.raises(ValueError, match="ref_model share the weights that are trained"):
        shared.train()


def test_an_adapter_that_was_loaded_frozen_is_not_trained_in_silence(
    make_trainer, make_distiller, make_lm, lora, tmp_path
):
    """PPO trained the critic alone; distillation ended in an error of autograd's."""
    get_peft_model(make_lm(), lora).save_pretrained(tmp_path / "adapter")
    for make in (make_trainer, make_distiller):
        trainer = make(model=PeftModel.from_pretrained(make_lm(), tmp_path / "adapter"))
        with pytest.raises(ValueError, match=r"no weight of model .* is_trainable=True"):
            trainer.train()


def test_a_reference_may_share_what_is_frozen(make_trainer, make_lm, steps):
    model, ref_model = make_lm(), make_lm()
    model.transformer.wpe.requires_grad_(False)
    ref_model.transformer.wpe = model.transformer.wpe
    trainer = make_trainer(model=model, ref_model=ref_model, learning_rate=1e-2)
    trainer.train()
    assert steps(trainer)[1]["kl/rb"] > 0


def test_a_reference_of_another_vocabulary_is_refused(make_trainer, make_lm):
    with pytest.raises(ValueError, match=r"logits of \d+ tokens and ref_model of 200"):
        make_trainer(ref_model=make_lm(vocab_size=200))


def test_a_model_that_lacks_tokens_of_the_tokenizer_is_refused(make_trainer, make_lm):
    with pytest.raises(ValueError, match="logits of 20 tokens and processing_class has 33"):
        make_trainer(model=make_lm(vocab_size=20))


def test_a_prompt_that_is_too_long_for_the_reference_alone_is_refused(make_trainer, make_lm):
    ref_model = make_lm(n_positions=8)
    with pytest.raises(ValueError, match="come to 11 tokens, and the model has 8 positions"):
        make_trainer(ref_model=ref_model)
    make_trainer(ref_model=ref_model, max_prompt_length=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_that_autocast_cannot_be_mixed_with_are_refused(make_trainer, make_lm, dtype):
    for name in ("model", "ref_model"):
        with pytest.raises(ValueError, match=rf" {name} has weights in torch.float.*bf16=False"):
            make_trainer(**{name: make_lm().to(dtype)}, bf16=True)


def test_a_second_adapter_is_refused(make_trainer, make_lm, lora):
    model = get_peft_model(make_lm(), lora)
    with pytest.raises(ValueError, match="leave peft_config out"):
        make_trainer(model=model, peft_config=lora)


def test_a_prompt_adapter_is_refused(make_trainer):
    """Its prompts are no part of the transformers model: nothing would be trained."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adapter .* such as LoRA"):
        make_trainer(peft_config=prompt)


def test_a_tokenizer_without_pad_token_is_refused(make_trainer, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        make_trainer(processing_class=bare)


def test_an_evaluation_without_prompts_is_refused(make_trainer):
    with pytest.raises(ValueError, match="'prompt' column is needed"):
        make_trainer().evaluate()


def test_a_prompt_that_its_tokenizer_makes_nothing_of_is_refused(make_trainer, make_tokenizer):
    """White space of another kind is text to `str.strip`, and nothing to the tokenizer."""
    trainer = make_trainer(train_dataset=data(*["it"] * 8), max_steps=1)
    trainer.tokenizer = lambda *args, **kwargs: {"input_ids": []}
    trainer.tokenizer.bos_token_id = None
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        trainer.train()


def test_a_reward_model_that_fails_is_named_by_its_value(make_trainer):
    def broken(prompts, texts):
        return torch.full((len(texts),), torch.nan)

    with pytest.raises(ValueError, match="the reward model gave nan for"):
        make_trainer(reward_funcs=broken).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_off_policy": "suffix"}, "'suffix'; use none, prefix or prefix_truncated"),
        ({"kl_weight_bound": 0.5}, r"kl_weight_bound is 0\.5; it must be at least 1"),
    ],
)
def test_off_policy_settings_that_mean_nothing_are_refused(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**changes)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("fsdp", True), ("deepspeed", "zero.json"), ("ACCELERATE_USE_FSDP", "true")],
)
def test_a_model_spread_over_processes_is_refused(
    make_lm, make_config, tokenizer, prompts, monkeypatch, setting, value
):
    args = make_config()
    if setting.isupper():  # of accelerate launch
        monkeypatch.setenv(setting, value)
    else:
        setattr(args, setting, value)  # for which transformers wants packages and GPUs
    with pytest.raises(ValueError, match="a whole model each"):
        PPOTrainer(make_lm(), LexiconReward(), args, prompts, tokenizer)
