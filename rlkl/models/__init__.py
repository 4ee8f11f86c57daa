"""Policies, references and critics: loading them, and reading hidden states from them."""

from rlkl.models.checkpointing import enable_checkpointing, recomputing
from rlkl.models.checks import check_causal_lm, few_tokens
from rlkl.models.critic import Critic
from rlkl.models.language_model import (
    EMBEDDED_LM,
    hidden_size,
    load_causal_lm,
    position_ids,
    response_hidden,
)
from rlkl.models.output_head import at_least_float32, output_head
from rlkl.models.pair import ModelPair, Side, load_pair
from rlkl.models.reference import (
    check_apart,
    check_reference,
    frozen_copy,
    keep_adapter,
    reference_model,
)
from rlkl.models.tokenizers import check_same_tokenizer, load_tokenizer, model_and_tokenizer

__all__ = [
    "EMBEDDED_LM",
    "Critic",
    "ModelPair",
    "Side",
    "at_least_float32",
    "check_apart",
    "check_causal_lm",
    "check_reference",
    "check_same_tokenizer",
    "enable_checkpointing",
    "few_tokens",
    "frozen_copy",
    "hidden_size",
    "keep_adapter",
    "load_causal_lm",
    "load_pair",
    "load_tokenizer",
    "model_and_tokenizer",
    "output_head",
    "position_ids",
    "recomputing",
    "reference_model",
    "response_hidden",
]
