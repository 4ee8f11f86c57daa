"""Causal language models seen as trunk (hidden states) and head (hidden states to logits)."""

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

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
        ValueError: it can only be a folder, and there is none, or it is a file.
    """
    source = os.path.expanduser(name_or_path or EMBEDDED_LM)
    if os.path.isfile(source):
        raise ValueError(f"{source} is a file: name the folder that a model was saved in")
    if not os.path.isdir(source) and (source.startswith((".", "/")) or source.count("/") > 1):
        raise ValueError(f"no such model folder: {source}")
    return source


@contextmanager
def reading_model(source: str | os.PathLike[str]) -> Iterator[None]:
    """What the libraries complain about in a model's files, in one line that names the model.

    Raises:
        ValueError: in place of theirs; it says what to do.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        complaint = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if os.path.isdir(source) or not isinstance(error, OSError):
            raise ValueError(
                f"{source} cannot be read: {complaint}; name a folder written by save_pretrained"
            ) from error
        raise ValueError(
            f"{source} is no folder here, and the hub does not give it: {complaint}"
        ) from error


@contextmanager
def _choosing_attention(name: str | None) -> Iterator[None]:
    """What the libraries complain about in the attention that was asked for, by its setting.

    Raises:
        ValueError: in place of theirs; it says what to set.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        complaint = str(error.__cause__ or error).strip().split("\n")[0]
        about_it = isinstance(error, ImportError) or "attention" in complaint or "attn" in complaint
        if name is None or not about_it:
            raise
        raise ValueError(
            f"attn_implementation is {name!r}: {complaint.rstrip('.')}; use eager or sdpa, or "
            "leave it out"
        ) from error


@contextmanager
def _quantising() -> Iterator[None]:
    """What transformers complains about in a quantisation that needs a package.

    Raises:
        ValueError: in place of its ImportError; it says what to install.
    """
    try:
        yield
    except ImportError as error:
        complaint = str(error).strip().split("\n")[0]
        if "quantiz" not in complaint:
            raise
        raise ValueError(f"{complaint.rstrip('.')}; or leave the quantisation out") from error


def load_causal_lm(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Loads a causal LM from the hub or a local folder; without a name, the embedded review LM.

    Args:
        name_or_path: hub id or folder.
        dtype: dtype of the weights. Trained weights should be float32 (train with bf16 autocast).
        attn_implementation: as in transformers; None takes "eager" on the CPU, where the backward
            of "sdpa" is about twice as slow for short responses, and the model's own choice on an
            accelerator.
        quantization_config: as in transformers; 4-bit and 8-bit weights are trained below an
            adapter only.
        device: where to put it.

    Raises:
        ValueError: a folder that is not there or has no weights, no causal LM, weights that cannot
            be read, do not fit the config or lack a part (which would be random numbers), an
            attention that the model or this machine has not, a quantisation whose package is not
            installed.
    """
    source = model_source(name_or_path)
    if os.path.isdir(source) and not any(
        os.path.isfile(os.path.join(source, name)) for name in _WEIGHTS
    ):
        if os.path.isfile(os.path.join(source, "adapter_config.json")):
            raise ValueError(
                f"{source} is an adapter: merge it into its base (merge_and_unload) and save that"
            )
        raise ValueError(
            f"{source} holds no weights (looked for {', '.join(_WEIGHTS[:2])}, …); "
            "name a folder written by save_pretrained"
        )
    asked_for = attn_implementation
    if attn_implementation is None and torch.device(device).type == "cpu":
        attn_implementation = "eager"
    with _choosing_attention(asked_for), _quantising(), reading_model(source):
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues] (a pair)
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            device_map=None if quantization_config is None else {"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    lacking = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if lacking:
        raise ValueError(
            f"the weights of {source} are not those of its config.json: {len(lacking)} are missing "
            f"or of another shape ({', '.join(lacking[:3])}, …); save the model again"
        )
    return model if quantization_config is not None else model.to(device)  # pyright: ignore[reportArgumentType] (decorated)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without a PEFT wrapper.

    Raises:
        ValueError: it is no transformers model, or an encoder with a decoder (T5, BART), or its
            adapter is a prompt: that is not part of the transformers model, which alone is read
            here.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"a {model.active_peft_config.peft_type} adapter puts learned prompts before the text, "
            "which rlkl does not read: use one that changes the layers, such as LoRA"
        )
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"a transformers causal LM is needed, not {type(inner).__name__}")
    if inner.config.is_encoder_decoder:
        raise ValueError(
            f"{type(inner).__name__} is an encoder with a decoder, which reads its prompt apart: a "
            "decoder-only causal LM is needed"
        )
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
    """Tokens that a text may have; inf where the model's config sets no limit.

    With longrope (Phi-3) it is the length at which all positions change: what a cache holds from
    before, when responses are sampled, keeps the old ones.
    """
    config = causal_lm(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return min(math.inf if limit is None else limit, _longrope_change(config))


def _longrope_change(config: PreTrainedConfig) -> float:
    """Tokens up to which longrope has its short factors; inf where a config has no longrope."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one a layer type
    changes = [
        kind["original_max_position_embeddings"]
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min(changes, default=math.inf)


def check_positions(model: nn.Module, length: int) -> None:
    """Refuses more tokens than a model has positions for.

    Raises:
        ValueError: with the settings that shorten them.
    """
    limit = max_positions(model)
    if length > limit:
        changed = limit == _longrope_change(causal_lm(model).config.get_text_config())
        raise ValueError(
            f"prompt and response come to {length} tokens, and the model has {limit} positions"
            + (" before its longrope changes them all" if changed else "")
            + ": set a smaller max_prompt_length or a shorter response"
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
