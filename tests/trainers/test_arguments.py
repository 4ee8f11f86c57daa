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
        (lambda completions, answers: [0.0], r"function of \(completions, answers\)"),
        ("a name", "reward_funcs has a str: pass reward models"),
        ([LexiconReward(), None], "reward_funcs has a NoneType"),
    ],
)
def test_rewards_that_cannot_be_called_are_refused_at_once(make_trainer, reward, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_trainer(reward_funcs=reward)
