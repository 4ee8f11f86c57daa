"""What distillation reads: checked whole before any work, and as the prompts of a batch."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlkl.data import check_texts
from rlkl.models.language_model import check_positions
from rlkl.models.tokenizers import padding_id
from rlkl.rollout.given import given_responses
from rlkl.rollout.sampling import encode_prompts
from rlkl.trainers.distill_config import DistillConfig
from rlkl.trainers.text_trainer import check_rows

_ROWS = 256  # tokenised together


def prompts_of(inputs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The batch's prompts; of plain text the bos token, from which a text is sampled whole.

    Raises:
        ValueError: plain text, and a tokenizer without a bos token.
    """
    if "prompt" in inputs:
        return list(inputs["prompt"])
    if tokenizer.bos_token is None:
        raise ValueError(
            "sampling needs a 'prompt' column: the tokenizer has no bos token to begin a text with"
        )
    return [str(tokenizer.bos_token)] * len(inputs["text"])


def check_data(
    data: Dataset,
    which: str,
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[nn.Module],
    args: DistillConfig,
    *,
    given: bool,
    sampled: bool,
) -> None:
    """Refuses data that a training or evaluation could not read to its end.

    Args:
        data: columns ``prompt`` and ``completion``, ``prompt`` alone, or ``text``.
        which: its name, for the complaint.
        tokenizer: of the models.
        models: those that read the data.
        args: the lengths.
        given: completions or texts are read.
        sampled: responses to the prompts are sampled.

    Raises:
        ValueError: says which column, or which row, and what to do.
    """
    check_rows(data, which)
    padding_id(tokenizer)  # or it says what to do
    columns = data.column_names
    if "text" in columns and "prompt" not in columns:
        needed = ["text"]
    else:
        needed = ["prompt", "completion"] if given else ["prompt"]
    if any(name not in columns for name in needed):
        raise ValueError(
            f"a dataset with the columns 'prompt' and 'completion', or 'text', is needed; "
            f"{which} has {columns}"
        )
    if len(data) == 0:
        raise ValueError(f"{which} has no rows: give it at least one")
    for name in needed:
        remedy = "leave such rows out"
        if name == "completion":
            remedy += ", or sample all responses (on_policy_fraction 1, or teacher_generated)"
        check_texts(list(data[name]), f"{which}: {name}", remedy)
    for begin in range(0, len(data), _ROWS):
        rows = data.select_columns(needed)[begin : begin + _ROWS]
        try:
            length = _longest(rows, tokenizer, args, given, sampled)
            for model in models:
                check_positions(model, length)
        except ValueError as error:
            end = begin + len(rows[needed[0]]) - 1
            raise ValueError(f"{which}, rows {begin} to {end}: {error}") from error


def _longest(
    rows: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    args: DistillConfig,
    given: bool,
    sampled: bool,
) -> int:
    """The most tokens that a model reads of a row: the last of a response is not read."""
    lengths = [0]
    if given:
        responses = given_responses(
            tokenizer,
            rows.get("prompt"),
            rows["completion"] if "prompt" in rows else rows["text"],
            args.response_length,
            max_prompt_length=args.max_prompt_length,
        )
        lengths += (responses.prompt_mask.sum(1) + responses.mask.sum(1) - 1).tolist()
    if sampled:
        prompts = prompts_of(rows, tokenizer)
        _, mask = encode_prompts(tokenizer, prompts, args.max_prompt_length)
        lengths.append(int(mask.sum(1).max()) + args.response_length - 1)
    return max(lengths)
