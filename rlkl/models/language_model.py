"""Causal language models seen as trunk (hidden states) and head (hidden states to logits)."""

import inspect
import math
import os
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

EMBEDDED_LM = Path(__file__).parent.parent / "data" / "assets" / "review_lm"
"""The review LM that ships with rlkl; see its model card for data and quality."""

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def model_source(name_or_path: str | os.PathLike[str] | None) -> str:
    """The hub id or folder that is meant; None means the embedded review LM.

    Raises:
        ValueError: it can only be a folder, and there is none.
    """
    source = os.path.expanduser(name_or_path or EMBEDDED_LM)
    if not os.path.isdir(source) and (source.startswith((".", "/")) or source.count("/") > 1):
        raise ValueError(f"no such model folder: {source}")
    return source


def load_causal_lm(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Loads a causal LM from the hub or a local folder; without a name, the embedded review LM.

    Args:
        name_or_path: hub id or folder.
        dtype: dtype of the weights. Trained weights should be float32 (train with bf16 autocast).
        attn_implementation: as in transformers; None takes "eager" on the CPU, where the backward
            of "sdpa" is about twice as slow for short responses, and the model's own choice on an
            accelerator.
        device: where to put it.

    Raises:
        ValueError: a folder that is not there, or has no weights.
    """
    source = model_source(name_or_path)
    if os.path.isdir(source) and not any(
        os.path.isfile(os.path.join(source, name)) for name in _WEIGHTS
    ):
        raise ValueError(
            f"{source} holds no weights (looked for {', '.join(_WEIGHTS[:2])}, …); "
            "name a folder written by save_pretrained"
        )
    if attn_implementation is None and torch.device(device).type == "cpu":
        attn_implementation = "eager"
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation=attn_implementation
    )
    return model.to(device)  # pyright: ignore[reportArgumentType] (decorated)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without a PEFT wrapper.

    Raises:
        ValueError: it is no transformers model, or its adapter is a prompt: that is not part of the
            transformers model, which alone is read here.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"a {model.active_peft_config.peft_type} adapter puts learned prompts before the text, "
            "which rlkl does not read: use one that changes the layers, such as LoRA"
        )
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"a transformers causal LM is needed, not {type(inner).__name__}")
    return inner


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding changes nothing.

    >>> position_ids(torch.tensor([[0, 0, 1, 1]]))
    tensor([[0, 0, 0, 1]])
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden states that the head reads."""
    head = causal_lm(model).get_output_embeddings()
    return getattr(head, "in_features", causal_lm(model).config.get_text_config().hidden_size)


def trunk_of(model: nn.Module) -> PreTrainedModel:
    """The module below the head: token ids to hidden states."""
    lm = causal_lm(model)
    below = getattr(lm, "model", lm) if lm.base_model is lm else lm.base_model  # Llama 4 has it so
    return cast(PreTrainedModel, below)


def max_positions(model: nn.Module) -> float:
    """Tokens that a text may have; inf where the model's config sets no limit."""
    limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    return math.inf if limit is None else limit


def check_positions(model: nn.Module, length: int) -> None:
    """Refuses more tokens than a model has positions for.

    Raises:
        ValueError: with the settings that shorten them.
    """
    limit = max_positions(model)
    if length > limit:
        raise ValueError(
            f"prompt and response come to {length} tokens, and the model has {limit} positions: "
            "set a smaller max_prompt_length or a shorter response"
        )


def response_hidden(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int
) -> Tensor:
    """Hidden states from which the response tokens are predicted: those *before* each of them.

    Args:
        model: causal LM, or the trunk of one.
        input_ids: left-padded prompts followed by responses, [B, P + T].
        attention_mask: [B, P + T], True at real tokens.
        response_length: T.

    Returns:
        [B, T, H]; entry t is the state at the prefix h_t. Differentiable in the model.

    Raises:
        ValueError: a text is longer than the model has positions for.
    """
    trunk = trunk_of(model)
    ids, mask = input_ids[:, :-1], attention_mask[:, :-1]
    if ids.shape[1] > max_positions(model):  # padding included; counting costs a transfer
        check_positions(model, int(mask.sum(1).max()))
    extra = {}
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        extra["position_ids"] = position_ids(mask)
    hidden = trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False, **extra)
    return hidden.last_hidden_state[:, -response_length:]
