"""What PPO reads, checked whole before any work: prompts, and the models that are to read them."""

import inspect
from collections.abc import Iterable
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from reward_models import RewardModel
from rlkl.data import check_prompts
from rlkl.kl import ModuleHead
from rlkl.kl.chunked import vocabulary_of
from rlkl.models import check_apart, check_causal_lm, check_reference, output_head
from rlkl.models.language_model import causal_lm, check_positions
from rlkl.models.tokenizers import padding_id
from rlkl.rollout import ColumnReward, FunctionReward, SumOfRewards, encode_prompts
from rlkl.rollout.scoring import AnyReward
from rlkl.trainers.config import PPOConfig
from rlkl.trainers.text_trainer import check_rows, check_weights

_ROWS = 256  # tokenised together
_GIVEN = {"prompts", "completions", "completion_ids"}  # to reward functions, beside columns


def check_prompt_data(
    data: Dataset | None,
    which: str,
    tokenizer: PreTrainedTokenizerBase,
    models: list[nn.Module],
    rewards: Iterable[AnyReward],
    args: PPOConfig,
    *,
    at_least: int = 1,
) -> None:
    """Refuses prompts that a training or evaluation could not read to its end.

    Args:
        data: prompts, in a column ``prompt``.
        which: its name, for the complaint.
        tokenizer: of the models.
        models: those that read prompts and responses.
        rewards: reward models and judges, of which some may read columns.
        args: the lengths.
        at_least: how many prompts are needed.

    Raises:
        ValueError: says which column or row, and what to do.
    """
    check_rows(data, which)
    padding_id(tokenizer)  # or it says what to do
    check_prompts(data, which, at_least)
    assert data is not None  # checked above
    check_columns(rewards, data, which)
    for begin in range(0, len(data), _ROWS):
        prompts = data[begin : begin + _ROWS]["prompt"]
        try:
            _, mask = encode_prompts(tokenizer, prompts, args.max_prompt_length)
            for model in models:  # the last token of a response is not read
                check_positions(model, int(mask.sum(1).max()) + args.response_length - 1)
        except ValueError as error:
            end = begin + len(prompts) - 1
            raise ValueError(f"{which}, rows {begin} to {end}: {error}") from error


def as_reward_model(reward: Any, which: str = "reward_funcs") -> AnyReward:
    """A reward model; a function of TRL's kind, (prompts, completions, **columns), is one too, and
    a list of either: their scores are added.

    Raises:
        ValueError: it can be called neither way.
    """
    if isinstance(reward, list | tuple):
        return SumOfRewards([as_reward_model(each, which) for each in reward])
    if not callable(reward):
        raise ValueError(f"{which} has a {type(reward).__name__}: pass reward models")
    signature = inspect.signature(reward)
    parameters = signature.parameters.values()
    all_there_is = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if "completions" not in signature.parameters:
        try:
            signature.bind([], [])
        except TypeError as error:
            if not all_there_is:
                raise ValueError(
                    f"{which} has a function of ({', '.join(signature.parameters)}): give it the "
                    "parameters (prompts, responses), or TRL's (prompts, completions, **columns)"
                ) from error
        else:
            return cast(RewardModel, reward)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes = None if all_there_is else frozenset(p.name for p in named)
    needs = {p.name for p in named if p.default is p.empty} - _GIVEN
    return FunctionReward(reward, takes, frozenset(needs))


def check_columns(rewards: Iterable[AnyReward], data: Dataset, which: str) -> None:
    """Refuses data without a column that a reward or judge is to read.

    Raises:
        ValueError: says which.
    """
    for reward in rewards:
        needs = reward.needs if isinstance(reward, ColumnReward) else frozenset()
        if lacking := sorted(needs - set(data.column_names)):
            raise ValueError(
                f"a reward function takes {', '.join(map(repr, lacking))}, which {which} does not "
                f"have (its columns: {', '.join(data.column_names)}): add a column of that name, "
                "or give the parameter a default"
            )


def check_models(
    model: nn.Module,
    ref_model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
) -> None:
    """Refuses a policy and a reference that cannot be sampled, measured and trained together.

    Both are in eval mode afterwards, as in every step. None, as in the trainers, is a copy of the
    policy or, with an adapter, the policy without it.

    Raises:
        ValueError: one that is not what `check_causal_lm` asks for; weights in float64 or float16
            that bf16 autocast cannot be mixed with; a head without rows for all the tokenizer's
            tokens, or with other rows than the reference's; a value model of quantised weights; a
            reference that would move with the policy (`check_reference_stays`). It says what to do.
    """
    models = {"model": model} | ({} if ref_model is None else {"ref_model": ref_model})
    check_weights(models, args)
    for name, each in models.items():
        check_causal_lm(each.eval(), name)
    check_reference_stays(model, ref_model)
    own_trunk = getattr(args, "separate_value_model", False)
    if own_trunk and getattr(causal_lm(model), "is_quantized", False):
        raise ValueError(
            "separate_value_model trains a copy of the policy's weights, and quantised ones cannot "
            "be: leave it out"
        )
    rows = vocabulary_of(output_head(model))
    if rows < len(tokenizer):
        raise ValueError(
            f"model gives logits of {rows} tokens and processing_class has {len(tokenizer)}: pass "
            "the model's own tokenizer, or give the new tokens rows by resize_token_embeddings"
        )
    if ref_model is not None and (other := vocabulary_of(output_head(ref_model))) != rows:
        raise ValueError(
            f"model gives logits of {rows} tokens and ref_model of {other}: both need one "
            "vocabulary; resize_token_embeddings makes them equal"
        )
    adapter_off = ref_model is None and isinstance(model, PeftModel)
    if adapter_off and isinstance(output_head(model), ModuleHead):
        raise ValueError(
            "this head's logits depend on whether the adapter is on, so that policy and "
            "reference cannot be in use at once: pass ref_model, a copy of the base model"
        )


def check_reference_stays(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Refuses a reference that would move while the policy's weights are trained as they are now.

    Raises:
        ValueError: it shares weights that are trained with the policy, or an adapter; or it is the
            policy with its adapter off, and weights of the base are trained.
    """
    if ref_model is not None:
        remedy = "leave it out (None is the model as it is now, without its adapter if any)"
        check_apart(model, ref_model, "ref_model", f"{remedy}, or load it a second time")
    elif isinstance(model, PeftModel):
        check_reference(model, None)
