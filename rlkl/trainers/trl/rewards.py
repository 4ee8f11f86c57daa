"""Reward models of this project as TRL's reward functions."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rlkl.rollout import score_texts


class RewardFunction:
    """A reward model (prompts, responses) -> [B] scores as TRL calls one.

    Args:
        reward: see `reward_models.RewardModel`.
        name: what logs and complaints call it.
    """

    def __init__(self, reward: Callable[..., Any], name: str) -> None:
        self.reward, self.__name__ = reward, name

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """One score for each completion.

        Raises:
            ValueError: conversations, or a reward model that does not give one finite score each.
        """
        if not isinstance(prompts[0], str):
            raise ValueError(
                f"{self.__name__} scores texts, and these prompts are conversations: give a "
                "reward function (prompts, completions, **columns), as TRL documents them"
            )
        return score_texts(self.reward, prompts, completions, self.__name__).tolist()


def as_reward_function(reward: Any) -> Any:
    """What TRL takes, made of what this project takes: reward models become functions.

    Raises:
        ValueError: a callable that is neither, or a classifier of which TRL would read the first
            logit whatever it means.
    """
    if isinstance(reward, str):
        return reward
    if isinstance(reward, nn.Module):
        if isinstance(reward, PreTrainedModel) and reward.config.num_labels != 1:
            raise ValueError(
                f"reward_funcs has a classifier of {reward.config.num_labels} labels, of which TRL "
                "takes the first logit: pass reward_models.SentimentReward(folder), which finds "
                "the positive one"
            )
        return reward
    if not callable(reward):
        raise ValueError(f"reward_funcs has a {type(reward).__name__}: pass reward models")
    parameters = inspect.signature(reward).parameters
    if "responses" in parameters:
        return RewardFunction(reward, getattr(reward, "__name__", type(reward).__name__))
    variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "completions" in parameters or variadic:
        return reward
    raise ValueError(
        f"reward_funcs has a function of ({', '.join(parameters)}): give it the parameters "
        "(prompts, responses), or TRL's (prompts, completions, **columns)"
    )
