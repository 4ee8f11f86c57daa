"""Settings and models that several test packages share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

# No test is timed: the first example of one may compile, and machines are busy.
settings.register_profile("rlkl", deadline=None)
settings.load_profile("rlkl")

MATHEMATICS = {Path(__file__).parent / "kl", Path(__file__).parent / "rl"}

WORDS = [
    "good",
    "great",
    "superb",
    "bad",
    "awful",
    "dull",
    "the",
    "a",
    "film",
    "plot",
    "acting",
    "end",
    "is",
    "was",
    "and",
    "but",
    "of",
    "to",
    "it",
    "this",
    "I",
    "found",
    "saw",
    "very",
    "so",
    "not",
    "with",
    "in",
    "on",
    "for",
    "all",
    "one",
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(  # peft 0.21 reads a property that transformers 5.23 has renamed
        "filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    )


@pytest.fixture(autouse=True)
def _float64_in_mathematics(request: pytest.FixtureRequest) -> Iterator[None]:
    """Formulas are checked in float64; models (every other folder) run in their own float32."""
    if not MATHEMATICS.intersection(request.path.parents):
        yield
        return
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models of width 32 are slower on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Builds a tokenizer of whole words; it pads on the left, by default with end of text."""

    def make(words: list[str] = WORDS, *, pad_is_eos: bool = True) -> PreTrainedTokenizerFast:
        special = ["<eos>"] if pad_is_eos else ["<eos>", "<pad>"]
        vocabulary = {word: i for i, word in enumerate([*special, *words])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=words[-1]))
        tokenizer.pre_tokenizer = Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<eos>",
            eos_token="<eos>",
            pad_token=special[-1],
            padding_side="left",
        )

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., GPT2LMHeadModel]:
    """Builds a GPT-2 of width 32 with random weights, large enough to make its choices uneven."""

    def make(vocab_size: int = 1 + len(WORDS), seed: int = 0, **config: Any) -> GPT2LMHeadModel:
        shape = {
            "vocab_size": vocab_size,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "attn_implementation": "eager",
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT2LMHeadModel(GPT2Config(**(shape | config))).eval()

    return make


@pytest.fixture
def lm(make_lm: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return make_lm()


@pytest.fixture
def folders(
    tmp_path: Path, make_lm: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> Path:
    """A folder with a tiny policy, a tiny classifier and prompts, as a user would have them."""
    tokenizer = make_tokenizer(pad_is_eos=False)
    make_lm(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=16,
        hidden_dim=16,
        n_layers=1,
        n_heads=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    (tmp_path / "prompts.txt").write_text("the film\nthis plot was\na superb end\nit is\n" * 2)
    return tmp_path
