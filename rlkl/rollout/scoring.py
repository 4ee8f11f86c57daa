"""Responses -> scores: by reward models, or functions that read columns of the data; sums."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reward_models import RewardModel
from rlkl.rollout.records import Responses


class ColumnReward(ABC):
    """What scores by further columns of the data (the right answer, say), one value a response."""

    needs: frozenset[str]
    """The columns without which it cannot be called."""

    @abstractmethod
    def bound_to(self, columns: Mapping[str, list[Any]]) -> RewardModel:
        """The reward model that these columns make of it."""


AnyReward = RewardModel | ColumnReward


class FunctionReward(ColumnReward):
    """TRL's kind of reward function: keywords prompts, completions, completion_ids, and columns.

    Args:
        function: returns one score for each completion; it is given what its parameters name, and
            all there is where it has ``**kwargs``.
        takes: its parameters; None: all there is.
        needs: those of them that only the data has.
    """

    def __init__(
        self, function: Callable[..., Any], takes: frozenset[str] | None, needs: frozenset[str]
    ) -> None:
        self.function, self.takes, self.needs = function, takes, needs

    def bound_to(self, columns: Mapping[str, list[Any]]) -> RewardModel:
        """The function of prompts and responses alone."""

        def score(prompts: Sequence[str], responses: Sequence[str]) -> Any:
            given = {**columns, "prompts": list(prompts), "completions": list(responses)}
            names = given.keys() if self.takes is None else given.keys() & self.takes
            return self.function(**{name: given[name] for name in names})

        return score


def score_responses(
    reward: AnyReward, responses: Responses, name: str = "the reward model"
) -> Tensor:
    """[B] scores of the responses' texts, float32. `name` is what a complaint calls the model.

    Raises:
        ValueError: the reward model does not give one finite score per response.
    """
    drawn = zip(responses.tokens, responses.mask, strict=True)
    ids = {"completion_ids": [tokens[real].tolist() for tokens, real in drawn]}
    reward = _bound(reward, responses.columns | ids)
    scores = score_texts(reward, responses.prompts, responses.texts, name)
    return scores.to(responses.mask.device)


def score_texts(
    reward: RewardModel, prompts: Sequence[str], texts: Sequence[str], name: str
) -> Tensor:
    """[B] scores of texts that follow prompts, float32.

    Raises:
        ValueError: the reward model does not give one finite score per text.
    """
    given = reward(prompts, texts)
    try:
        scores = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} gave {given!r:.60}, which are no numbers; one score is needed for each of the "
            f"{len(texts)} responses"
        ) from error
    if scores.shape != (len(texts),):
        raise ValueError(
            f"{name} gave scores of shape {tuple(scores.shape)} "
            f"for {len(texts)} responses; one score each is needed"
        )
    if not bool(scores.isfinite().all()):
        worst = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"{name} gave {float(scores[worst])} for {texts[worst]!r}; scores must be finite"
        )
    return scores


class SumOfRewards(ColumnReward):
    """The sum of several rewards, added in float32.

    Args:
        rewards: at least one.

    Raises:
        ValueError: there are no rewards.
    """

    def __init__(self, rewards: Sequence[AnyReward]) -> None:
        if not rewards:
            raise ValueError("reward_funcs is empty: give one reward model or more")
        self.rewards = rewards
        columns = [each.needs for each in rewards if isinstance(each, ColumnReward)]
        self.needs = frozenset().union(*columns)

    def bound_to(self, columns: Mapping[str, list[Any]]) -> RewardModel:
        """[B] sums; it refuses as `score_texts` does, by the number of the reward."""
        rewards = [_bound(each, columns) for each in self.rewards]
        names = [f"reward model {i} of {len(rewards)}" for i in range(1, len(rewards) + 1)]

        def score(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
            pairs = zip(rewards, names, strict=True)
            scores = [score_texts(reward, prompts, responses, name) for reward, name in pairs]
            return torch.stack([each.cpu() for each in scores]).sum(0)

        return score


def _bound(reward: AnyReward, columns: Mapping[str, list[Any]]) -> RewardModel:
    return reward.bound_to(columns) if isinstance(reward, ColumnReward) else reward
