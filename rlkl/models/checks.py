"""Whether a model is what everything else takes a causal LM to be."""

import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlkl.kl import head_logits
from rlkl.kl.chunked import vocabulary_of
from rlkl.models.language_model import causal_lm, max_positions, position_ids, trunk_of
from rlkl.models.output_head import at_least_float32, output_head

_TOKENS = 8


@torch.no_grad()
def check_causal_lm(model: nn.Module, name: str) -> None:
    """Checks on a few tokens what sampling and measuring rest on.

    The model is finite and causal, its logits are its head applied to its hidden states, and
    padding on the left and a cache of what was read change nothing. Call it on a model in eval
    mode.

    Raises:
        ValueError: one of them is not so, in words that begin with `name`.
    """
    head, trunk = at_least_float32(output_head(model)), trunk_of(model)
    vocab, ids = vocabulary_of(head), _few_ids(model)
    hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
    if not bool(hidden.isfinite().all()):
        raise ValueError(
            f"{name} gives hidden states that are not finite: its weights are broken, or its dtype "
            f"({hidden.dtype}) is too narrow for them; load others, or in float32"
        )
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % vocab
    changed = trunk(input_ids=other, use_cache=False).last_hidden_state
    rounded = getattr(causal_lm(model), "is_quantized", False) or hidden.itemsize < 4
    tolerance = 5e-2 if rounded else 1e-3

    def differ(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
        return float((found - expected).abs().max()) > tolerance * float(scale.abs().max())

    if differ(changed[:, :-1], hidden[:, :-1], hidden):
        raise ValueError(
            f"{name} is no causal language model: a later token changes what it says before it"
        )
    expected = head_logits(head, hidden).float()
    if expected.isnan().any():
        raise ValueError(f"{name}: its logits are no numbers; look for NaN in its weights")
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if differ(whole.logits.float(), expected, expected):
        raise ValueError(
            f"{name}: its logits are not its head times its last hidden states, so its "
            "distributions cannot be formed from them"
        )
    if not _takes(trunk, "past_key_values") or differ(
        _last_read(trunk, ids), hidden[:, -1], hidden
    ):
        raise ValueError(
            f"{name} ({type(trunk).__name__}) says something else when its prompt is padded on the "
            "left and its tokens are read one by one with a key-value cache, as they are sampled "
            "here: recurrent models, and others without such a cache, cannot be used"
        )


@torch.no_grad()
def few_tokens(model: nn.Module) -> Tensor:
    """[8, H + 1] what a model makes of a few tokens: hidden states, and log Σ exp of its logits.

    All of it is finite unless the model is broken; logits of −∞ are none of a broken one.
    """
    ids = _few_ids(model)
    hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    logits = head_logits(at_least_float32(output_head(model)), hidden).float()
    return torch.cat([hidden, logits.logsumexp(-1, keepdim=True)], 1)


def _few_ids(model: nn.Module) -> Tensor:
    """[1, 8] token ids; fewer where the model has fewer positions."""
    length = int(min(_TOKENS, max_positions(model)))
    ids = torch.arange(length, device=causal_lm(model).device)
    return ids[None] % vocabulary_of(output_head(model))


def _last_read(trunk: PreTrainedModel, ids: Tensor) -> Tensor:
    """The last hidden state as the sampler reads it: padding, all but the last token, the last."""
    padded = torch.cat([ids[:, :1], ids], 1)
    mask = torch.ones_like(padded)
    mask[:, 0] = 0
    positions, cache = position_ids(mask), DynamicCache(config=trunk.config)
    hidden = torch.empty(0)
    for part in (slice(0, -1), slice(-1, None)):
        extra = {"position_ids": positions[:, part]} if _takes(trunk, "position_ids") else {}
        hidden = trunk(
            input_ids=padded[:, part],
            attention_mask=mask[:, : part.stop],
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).last_hidden_state
    return hidden[:, -1]


def _takes(trunk: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(trunk.forward).parameters
