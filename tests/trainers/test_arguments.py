"""PPO called as TRL's trainers are: models by name, reward functions of TRL's kind."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from reward_models import LexiconReward
from rlkl.models import load_causal_lm
from rlkl.trainers import PPOTrainer


def test_a_model_may_be_named_and_brings_its_tokenizer(folders, make_config, prompts):
    name = str(folders / "policy")
    by_name = PPOTrainer(name, LexiconReward(), make_config(), prompts)
    assert by_name.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(name).get_vocab()
    given = PPOTrainer(load_causal_lm(name), LexiconReward(), make_config(), prompts)
    for trainer in (by_name, given):
        trainer.train()
    for one, other in zip(by_name.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_without_a_name_needs_its_tokenizer(make_lm, make_config, prompts):
    with pytest.raises(ValueError, match="processing_class is missing"):
        PPOTrainer(make_lm(), LexiconReward(), make_config(), prompts)


def test_functions_of_trls_kind_score_what_reward_models_do(make_trainer):
    lexicon = LexiconReward()
    seen: list[tuple[list[str], list[str]]] = []

    def of_trl(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append((prompts, completions))
        return lexicon(prompts, completions).tolist()

    def of_completions(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    trainers = [
        make_trainer(reward_funcs=reward, judges={"own": judge})
        for reward, judge in ((lexicon, lexicon), ([of_trl, of_completions], of_trl))
    ]
    for trainer in trainers:
        trainer.train()
    weights = [list(trainer.model.parameters()) for trainer in trainers]
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)
    assert all(type(texts) is list for call in seen for texts in call)


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        (lambda texts: [0.0], r"reward_funcs has a function of \(texts\): give it the parameters"),
        (lambda a, b, c: [0.0], r"function of \(a, b, c\)"),
        ("a name", "reward_funcs has a str: pass reward models"),
        ([LexiconReward(), None], "reward_funcs has a NoneType"),
    ],
)
def test_rewards_that_cannot_be_called_are_refused_at_once(make_trainer, reward, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_trainer(reward_funcs=reward)


ANSWERS = ["good", "bad", "no", "yes", "so", "it"] * 2


def test_functions_read_the_columns_that_belong_to_each_prompt(make_trainer, prompts, tokenizer):
    data, calls = prompts.add_column("answer", ANSWERS), []

    def of_answers(
        prompts: list[str],
        completions: list[str],
        answer: list[str],
        completion_ids: list[list[int]],
        scale: float = 1.0,
    ) -> list[float]:
        calls.append((prompts, answer))
        plain = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        assert [text.strip() for text in plain] == [text.strip() for text in completions]
        return [scale * float(word in text) for text, word in zip(completions, answer, strict=True)]

    def of_all(**columns: Any) -> list[float]:
        assert columns.keys() == {"prompt", "answer", "prompts", "completions", "completion_ids"}
        assert columns["prompt"] == columns["prompts"]
        return [0.0] * len(columns["completions"])

    trainer = make_trainer(
        reward_funcs=[of_answers, of_all],
        judges={"own": of_answers},
        train_dataset=data,
        eval_dataset=data,
        num_generations=2,
        per_device_train_batch_size=4,
    )
    trainer.train()
    trainer.evaluate()
    of = dict(zip(data["prompt"], ANSWERS, strict=True))
    assert {len(seen) for seen, _ in calls} == {8, 24}  # steps' responses, evaluations'
    for seen, answers in calls:
        assert answers == [of[prompt] for prompt in seen]


def test_data_without_a_column_that_a_function_takes_are_refused(make_trainer, prompts):
    def reward(completions: list[str], answer: list[str]) -> list[float]:
        return [0.0] * len(completions)

    complaint = r"takes 'answer', which {} does not have \(its columns: prompt\)"
    with pytest.raises(ValueError, match=complaint.format("train_dataset")):
        make_trainer(reward_funcs=[LexiconReward(), reward])
    with pytest.raises(ValueError, match=complaint.format("train_dataset")):
        make_trainer(judges={"own": reward})
    data = prompts.add_column("answer", ANSWERS)
    with pytest.raises(ValueError, match=complaint.format("eval_dataset")):
        make_trainer(reward_funcs=reward, train_dataset=data, eval_dataset=prompts)
