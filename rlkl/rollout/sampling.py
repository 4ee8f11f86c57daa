"""Ancestral sampling of responses from a causal LM, with the key-value cache and without
`generate`.

`generate` spends, for a small model, more time on its own bookkeeping than on the model. Here a
step is one pass of the trunk, one product with the head, and one draw.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlkl.data import check_text
from rlkl.kl import head_logits
from rlkl.models import at_least_float32, output_head, position_ids
from rlkl.models.language_model import causal_lm, check_positions, trunk_of
from rlkl.models.tokenizers import padding_id
from rlkl.rollout.cache import reserved_cache
from rlkl.rollout.records import Responses

# Tokens that a draw sums one by one.
_DRAW_BLOCK = 64


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of the prompts, left-padded, opened by the tokenizer's bos token if it
    has one.

    A prompt longer than `max_length` tokens loses its beginning, as a context window would.

    Raises:
        ValueError: there are no prompts, or one of them is empty or no text; or `prompts` is one
            text, which would be read letter by letter.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts!r:.60}: give a list of them")
    if not prompts:
        raise ValueError("no prompts were given")
    rows = []
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for number, prompt in enumerate(prompts):
        check_text(prompt, f"prompt {number}")
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"prompt {number} is empty; every prompt needs at least one token")
        if ids[0] != tokenizer.bos_token_id:
            ids = opening + ids
        rows.append(ids if max_length is None else ids[-max_length:])
    width = max(map(len, rows))
    token_ids = torch.full((len(rows), width), padding_id(tokenizer))
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        token_ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return token_ids, mask


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    *,
    eos_token_ids: Iterable[int],
    pad_token_id: int,
    temperature: float,
    generator: torch.Generator,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples y_t ~ softmax(logits / temperature) until end of text or the length limit.

    Only the first `vocab_size` tokens are drawn, where the head is padded beyond them.

    Returns:
        tokens [B, T], mask [B, T] and ended [B]; see :class:`rlkl.rollout.Responses`.
    """
    # What is drawn must be what is measured later, in float32: no 16-bit logits.
    trunk, head = trunk_of(model), at_least_float32(output_head(model))
    batch, prompt_length = prompt_ids.shape
    eos = torch.tensor(sorted(eos_token_ids), device=prompt_ids.device)
    tokens = torch.full((batch, max_new_tokens), pad_token_id, device=prompt_ids.device)
    mask = torch.zeros(batch, max_new_tokens, dtype=torch.bool, device=prompt_ids.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompt_ids.device)
    attention_mask = torch.ones(
        batch, prompt_length + max_new_tokens, dtype=torch.long, device=prompt_ids.device
    )
    attention_mask[:, :prompt_length] = prompt_mask
    positions = position_ids(attention_mask)
    takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters

    cache = reserved_cache(trunk.config, prompt_length + max_new_tokens)
    step_ids, seen = prompt_ids, 0
    for t in range(max_new_tokens):
        upto = prompt_length + t
        extra = {"position_ids": positions[:, seen:upto]} if takes_positions else {}
        hidden = trunk(
            input_ids=step_ids,
            attention_mask=attention_mask[:, :upto],
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).last_hidden_state[:, -1]
        seen = upto
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head_logits(head, hidden.float()).float()
        drawn = _draw(logits[:, :vocab_size] / temperature, generator)
        tokens[:, t] = torch.where(ended, pad_token_id, drawn)
        mask[:, t] = ~ended
        ended = ended | torch.isin(drawn, eos)
        if bool(ended.all()):
            break
        step_ids = tokens[:, t : t + 1]
    length = int(mask.sum(1).max())
    return tokens[:, :length], mask[:, :length], ended


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw per row by inverting the distribution function: a single uniform a row.

    `torch.multinomial` draws a number for every token of the vocabulary, which takes longer than a
    small model's forward pass. First a block of tokens, then a token of it, so that only one block
    is summed token by token; in float64, so that rare tokens keep their probability in the sum.
    """
    p = logits.softmax(-1)
    blocks = nn.functional.pad(p, (0, -p.shape[1] % _DRAW_BLOCK)).unflatten(1, (-1, _DRAW_BLOCK))
    upto = blocks.sum(-1).double().cumsum(-1)
    uniform = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.double)
    point = uniform * upto[:, -1:]
    block = torch.searchsorted(upto, point, right=True).clamp(max=upto.shape[1] - 1)
    begin = nn.functional.pad(upto, (1, 0)).gather(1, block)
    share = (point - begin) / (upto.gather(1, block) - begin)
    inner = blocks.take_along_dim(block[:, :, None], 1)[:, 0].double().cumsum(-1)
    token = torch.searchsorted(inner, share * inner[:, -1:], right=True)
    return (block * _DRAW_BLOCK + token).squeeze(1).clamp(max=p.shape[1] - 1)


def sample_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator,
    batch_size: int = 256,
    max_prompt_length: int | None = None,
    vocab_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Responses:
    """Samples one response to each prompt.

    Prompts are taken in the order of their length, so that a batch carries little padding; the
    record is in the order of `prompts`.

    Args:
        model: policy or reference; left in the mode it is in (use eval mode).
        tokenizer: the model's.
        prompts: texts; repeat a prompt for several responses to it.
        max_new_tokens: limit on the response's length in tokens.
        temperature: logits are divided by it; it is part of the policy's distribution.
        generator: source of all randomness.
        batch_size: responses sampled together.
        max_prompt_length: longest prompt in tokens; longer ones lose their beginning.
        vocab_size: real tokens, where the head is padded beyond them; None: all its rows.
        on_batch: called with the number of responses done in each batch, for a progress bar.

    Raises:
        ValueError: no prompts, one that is empty or no text, or more tokens than the model has
            positions for.
    """
    device = causal_lm(model).device
    prompt_ids, prompt_mask = encode_prompts(tokenizer, prompts, max_prompt_length)
    eos_token_ids = _eos_token_ids(model, tokenizer)
    lengths = prompt_mask.sum(1)
    check_positions(model, int(lengths.max()) + max_new_tokens - 1)  # the last is not read
    order = torch.argsort(lengths, stable=True)
    pad_token_id = padding_id(tokenizer)
    tokens = torch.full((len(prompts), max_new_tokens), pad_token_id)
    mask = torch.zeros(len(prompts), max_new_tokens, dtype=torch.bool)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for rows in order.split(batch_size):
        width = int(lengths[rows].max())
        drawn, real, stopped = sample_tokens(
            model,
            prompt_ids[rows, -width:].to(device),
            prompt_mask[rows, -width:].to(device),
            max_new_tokens,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            temperature=temperature,
            generator=generator,
            vocab_size=vocab_size,
        )
        tokens[rows, : drawn.shape[1]] = drawn.cpu()
        mask[rows, : drawn.shape[1]] = real.cpu()
        ended[rows] = stopped.cpu()
        if on_batch is not None:
            on_batch(len(rows))
    length = int(mask.sum(1).max())
    tokens, mask = tokens[:, :length], mask[:, :length]
    return Responses(
        prompts=list(prompts),
        texts=response_texts(tokenizer, _real(prompt_ids, prompt_mask), _real(tokens, mask)),
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        tokens=tokens.to(device),
        mask=mask.to(device),
        ended=ended.to(device),
    )


def _real(token_ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(token_ids, mask, strict=True)]


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], responses: list[list[int]]
) -> list[str]:
    """The responses as they read after their prompts, special tokens left out.

    Decoded alone, a response loses its leading space with tokenizers such as Llama's, which drop
    that of a text: its first word would be one with the prompt's last.
    """

    def decode(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    wholes = decode([p + r for p, r in zip(prompts, responses, strict=True)])
    return [
        whole.removeprefix(prompt) if whole.startswith(prompt) else decode([response])[0]
        for whole, prompt, response in zip(wholes, decode(prompts), responses, strict=True)
    ]


def _eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End-of-text ids of the tokenizer and of the model's generation config (chat models have
    several).
    """
    ids: list[Any] = [tokenizer.eos_token_id]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids += configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in ids if token_id is not None}
