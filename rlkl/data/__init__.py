"""Review texts and prompts: from files, from the hub, or those that ship with rlkl."""

from rlkl.data.pairs import INSTRUCTION_TEMPLATE, load_pairs
from rlkl.data.prompts import (
    EMBEDDED_EVAL_PROMPTS,
    EMBEDDED_TRAIN_PROMPTS,
    check_prompts,
    check_text,
    check_texts,
    collate_prompts,
    load_prompts,
    repeated,
)
from rlkl.data.reviews import clean_text, load_reviews

__all__ = [
    "EMBEDDED_EVAL_PROMPTS",
    "EMBEDDED_TRAIN_PROMPTS",
    "INSTRUCTION_TEMPLATE",
    "check_prompts",
    "check_text",
    "check_texts",
    "clean_text",
    "collate_prompts",
    "load_pairs",
    "load_prompts",
    "load_reviews",
    "repeated",
]
