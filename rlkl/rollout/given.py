"""Given texts as responses: what off-policy distillation and held-out evaluation read."""

from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from rlkl.models.tokenizers import padding_id
from rlkl.rollout.records import Responses
from rlkl.rollout.sampling import encode_prompts


def given_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | None,
    completions: list[str],
    max_new_tokens: int,
    *,
    max_prompt_length: int | None = None,
    device: str | torch.device = "cpu",
) -> Responses:
    """Completions of prompts, or plain texts, in the record that sampling fills.

    Only the completion is a response: what is measured or trained on it leaves the prompt out. A
    completion ends with the tokenizer's end-of-text token, unless it is cut at the limit. Prompt
    and completion are tokenised apart, as they are when a model answers.

    Args:
        tokenizer: the models'.
        prompts: one for each completion; None for plain text, all of which is then response, after
            the tokenizer's bos token (where it has none, after the text's own first token).
        completions: the texts.
        max_new_tokens: longest response in tokens, its end-of-text token included.
        max_prompt_length: longest prompt in tokens; longer ones lose their beginning.
        device: where the tensors go.

    Raises:
        ValueError: no completions, an empty prompt, plain text that is empty, or a text without a
            token to predict.
    """
    if not completions:
        raise ValueError("no completions were given")
    encoded = tokenizer(completions, add_special_tokens=False)["input_ids"]
    rows = [list(cast(list[int], row)) for row in encoded]
    if prompts is None:
        if not all(rows):
            raise ValueError(f"text {next(i for i, row in enumerate(rows) if not row)} is empty")
        bos = tokenizer.bos_token_id
        first = [row.pop(0) if bos is None or row[0] == bos else bos for row in rows]
        prompt_ids = torch.tensor(first)[:, None]
        prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    else:
        prompt_ids, prompt_mask = encode_prompts(tokenizer, prompts, max_prompt_length)
    if tokenizer.eos_token_id is not None:
        rows = [[*row, cast(int, tokenizer.eos_token_id)] for row in rows]
    if not all(rows):
        kind, i = "text" if prompts is None else "completion", rows.index([])
        raise ValueError(
            f"{kind} {i} leaves no token to predict: the tokenizer has no end-of-text token to "
            "close it with"
        )
    ended = torch.tensor([len(row) <= max_new_tokens for row in rows])
    rows = [row[:max_new_tokens] for row in rows]
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), padding_id(tokenizer))
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return Responses(
        prompts=[""] * len(rows) if prompts is None else list(prompts),
        texts=list(completions),
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        tokens=tokens.to(device),
        mask=mask.to(device),
        ended=ended.to(device),
    )
