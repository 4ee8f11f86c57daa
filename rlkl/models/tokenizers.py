"""Tokenizers: loading them for left-padded generation, and telling whether two are the same."""

import os
from typing import cast

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlkl.models.language_model import causal_lm, load_causal_lm, model_source, reading_model


def load_tokenizer(name_or_path: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads on the left; without a name, the embedded review LM's.

    A tokenizer without a padding token pads with its end-of-text token: masks, not token ids,
    tell padding from text everywhere in rlkl, so a real end of text is kept.

    Raises:
        ValueError: there is none, it cannot be read, or it has neither pad nor eos token.
    """
    source = model_source(name_or_path)
    with reading_model(source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        except OSError:
            raise
        except Exception as error:  # the tokenizers library has no exceptions of its own
            raise ValueError(f"no tokenizer, or a broken one: {error}") from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{source} has no tokenizer: save that of the model there (tokenizer.save_pretrained)"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {source} has neither pad nor eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_and_tokenizer(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, loaded where a name or nothing is given for them.

    Raises:
        ValueError: a model that was not loaded by a name, without its tokenizer.
    """
    name = model if isinstance(model, str) else causal_lm(model).config.name_or_path
    if tokenizer is None and not name:
        raise ValueError("processing_class is missing: pass the model's tokenizer")
    loaded = load_causal_lm(model) if isinstance(model, str) else model
    return loaded, tokenizer or load_tokenizer(name)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's padding token.

    Raises:
        ValueError: it has none; says how to give it one.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no pad token: tokenizer.pad_token = tokenizer.eos_token gives it one"
        )
    return cast(int, tokenizer.pad_token_id)


def check_same_tokenizer(policy: PreTrainedTokenizerBase, ref: PreTrainedTokenizerBase) -> None:
    """Refuses two tokenizers that do not give every token the same id.

    A KL between next-token distributions exists only over one vocabulary.

    Raises:
        ValueError: names the sizes and the first token that differs.
    """
    ours, theirs = policy.get_vocab(), ref.get_vocab()
    if ours == theirs:
        return
    token = next(t for t in (*ours, *theirs) if ours.get(t) != theirs.get(t))
    raise ValueError(
        f"policy and reference have different tokenizers ({len(ours)} and {len(theirs)} tokens; "
        f"{token!r} is {ours.get(token)} in one and {theirs.get(token)} in the other): "
        "a KL needs one vocabulary"
    )
