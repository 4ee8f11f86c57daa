"""What RLOO and GRPO refuse before any work, and what they take for a reward."""

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from reward_models import LexiconReward
from rlkl.trainers.trl import RaoBlackwellGRPOTrainer, RaoBlackwellRLOOTrainer
from rlkl.trainers.trl.rewards import as_reward_function
from tests.trainers.trl.cases import both_trainers


@both_trainers
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("repetition_penalty", 1.2),
        ("generation_kwargs", {"no_repeat_ngram_size": 2}),
        ("mask_truncated_completions", True),
        ("sync_ref_model", True),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("beta", -0.1),
        ("beta", float("inf")),
        ("num_iterations", 0),
        ("steps_per_generation", 0),
        ("steps_per_generation", -1),
        ("num_generations_eval", -1),
        ("epsilon", float("nan")),
        ("epsilon", 0.0),
        ("epsilon_high", float("nan")),
        ("epsilon_high", -1.0),
        ("neftune_noise_alpha", 5.0),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_settings_that_change_the_gradient_are_refused(
    make_trl_trainer, trainer_class, setting, value
):
    with pytest.raises(ValueError, match=f"^{setting} is .*: it "):
        make_trl_trainer(trainer_class, **{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("loss_type", "grpo"),
        ("loss_type", "cispo"),
        ("importance_sampling_level", "sequence"),
        ("top_entropy_quantile", 0.2),
        ("off_policy_mask_threshold", 1.0),
        ("delta", 1.0),
        ("delta", float("nan")),
    ],
)
def test_grpos_ways_to_drop_or_reweigh_tokens_are_refused(make_trl_trainer, setting, value):
    with pytest.raises(ValueError, match=f"^{setting} is .*: it "):
        make_trl_trainer(RaoBlackwellGRPOTrainer, **{setting: value})


def test_rloos_normalised_advantages_and_turned_limits_are_refused(make_trl_trainer):
    with pytest.raises(ValueError, match="normalize_advantages is True: it divides the score"):
        make_trl_trainer(RaoBlackwellRLOOTrainer, normalize_advantages=True)
    for limits in ((1.0, -1.0), (0.0, float("nan"))):
        with pytest.raises(ValueError, match=r"reward_clip_range is .*: it must be two numbers"):
            make_trl_trainer(RaoBlackwellRLOOTrainer, reward_clip_range=limits)
    make_trl_trainer(RaoBlackwellRLOOTrainer, reward_clip_range=(float("-inf"), 1.0))


@both_trainers
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"reward_weights": [float("nan")]}, r"reward_weights is \[nan\]; give a finite number"),
        ({"warmup_steps": float("inf")}, "warmup_steps is inf; give a finite number"),
        ({"adam_beta2": 1.0}, r"adam_beta2 is 1.0; it must lie in \[0, 1\)"),
        ({"logging_steps": -1}, "logging_steps is -1; give the steps from one to the next"),
        ({"save_strategy": "steps", "save_steps": 0}, r"save_steps is 0; .*\(save_strategy no is"),
        ({"max_steps": -1, "num_train_epochs": 0}, "nothing would be trained"),
    ],
)
def test_numbers_that_are_none_or_would_be_passed_over_are_refused(
    make_trl_trainer, trainer_class, settings, complaint
):
    with pytest.raises(ValueError, match=complaint):
        make_trl_trainer(trainer_class, **settings)


@both_trainers
def test_fp16_on_a_cpu_and_too_few_prompts_are_refused(make_trl_trainer, prompts, trainer_class):
    with pytest.raises(ValueError, match="fp16 has no effect on a CPU: leave it out, or set bf16"):
        make_trl_trainer(trainer_class, fp16=True)
    with pytest.raises(ValueError, match="1 prompts, and a rollout takes 2; give more prompts or"):
        make_trl_trainer(trainer_class, train_dataset=prompts.select([0]))


@both_trainers
def test_models_that_cannot_be_measured_are_refused(
    make_trl_trainer, make_lm, make_tokenizer, trainer_class
):
    with pytest.raises(ValueError, match="ref_model of 4: both need one vocabulary"):
        make_trl_trainer(trainer_class, ref_model=make_lm(vocab_size=4))
    with pytest.raises(ValueError, match="model gives logits of 4 tokens"):
        make_trl_trainer(trainer_class, model=make_lm(vocab_size=4))
    model = make_lm()
    with pytest.raises(ValueError, match="model and ref_model share the weights"):
        make_trl_trainer(trainer_class, model=model, ref_model=model)


@both_trainers
def test_dropout_that_cannot_be_switched_off_is_refused(make_trl_trainer, make_lm, trainer_class):
    model = make_lm()
    block = model.transformer.h[0].mlp
    given = block.forward
    block.forward = lambda x: torch.nn.functional.dropout(given(x), 0.5, training=block.training)
    with pytest.raises(ValueError, match="has dropout that is no module of its own"):
        make_trl_trainer(trainer_class, model=model)


def classifier(labels: int) -> DistilBertForSequenceClassification:
    shape = {"vocab_size": 40, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 1}
    return DistilBertForSequenceClassification(DistilBertConfig(**shape, num_labels=labels))


def test_reward_models_become_trls_reward_functions():
    function = as_reward_function(LexiconReward())
    assert function.__name__ == "LexiconReward"
    scores = function(prompts=["a film"] * 2, completions=[" good", " bad"], completion_ids=[[1]])
    assert scores == LexiconReward()(["a film"] * 2, [" good", " bad"]).tolist()
    with pytest.raises(ValueError, match="LexiconReward scores texts, and these prompts are conv"):
        function(prompts=[[{"role": "user", "content": "a"}]], completions=[[]])

    def bad(prompts, responses):
        return torch.tensor([float("nan")] * len(responses))

    with pytest.raises(ValueError, match="bad gave nan for 'x'; scores must be finite"):
        as_reward_function(bad)(["p"], ["x"])


def test_what_trl_takes_is_left_to_it():
    def theirs(prompts, completions, **columns):
        return [0.0] * len(prompts)

    one_label = classifier(1)
    for reward in (theirs, one_label, "some/model"):
        assert as_reward_function(reward) is reward


def test_other_rewards_are_refused():
    with pytest.raises(ValueError, match=r"a classifier of 2 labels.*SentimentReward"):
        as_reward_function(classifier(2))
    with pytest.raises(ValueError, match=r"a function of \(texts\): give it the parameters"):
        as_reward_function(lambda texts: texts)
    with pytest.raises(ValueError, match="reward_funcs has a float: pass reward models"):
        as_reward_function(1.0)
