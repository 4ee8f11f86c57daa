"""Sentiment of a text as a reward: any transformers sequence classifier with a positive label."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

_ASSETS = Path(__file__).parent / "assets"
EMBEDDED_REWARD = _ASSETS / "sentiment_reward"
EMBEDDED_JUDGE = _ASSETS / "sentiment_judge"

_POSITIVE_NAMES = ("positive", "pos")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


class RewardModel(Protocol):
    """Scores prompt-response pairs: one float32 number per pair, higher is better. [B]

    The unit and range are those of the implementation, which must document them. Scores carry no
    gradient and do not depend on which other pairs are in the call.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor: ...


class SentimentReward:
    """Log-odds that a text is positive: log p(positive) − log Σ_other p(label), in nats. [B]

    Range: all reals; 0 means "as likely positive as not", 2.2 means 90% positive. With two labels
    it is the difference of the two logits. The text is the prompt followed by the response, joined
    as they are (a decoded response brings its own leading space), read by the classifier's own
    tokenizer and cut at the end to `max_length` tokens.

    Args:
        model_name_or_path: local folder or hub id of a sequence classifier; None is the embedded
            reward classifier (`EMBEDDED_REWARD`), `EMBEDDED_JUDGE` is the embedded judge.
        positive_label: name of the positive label in the model's ``id2label`` (case does not
            matter); None finds "positive" or "pos".
        score: "log_odds" as above, or "logit": the raw logit of the positive label, the score of
            Amini et al. (2025, https://arxiv.org/abs/2504.10637) with lvwerra/distilbert-imdb. One
            logit alone has no unit: only differences between logits do.
        max_length: tokens read of each text; None reads as many as the model can.
        batch_size: texts per forward pass. It changes speed and memory, not scores.
        device: None takes the GPU where there is one.
        clamp: scores are limited to [−clamp, clamp]. It flattens the reward where the classifier is
            (over)confident: a policy gains nothing beyond it. None, the default, limits nothing.

    Raises:
        ValueError: a setting out of its range, no positive label, a model without a trained
            classification head, or one whose scores depend on the padding.
        OSError: there is no such model, or its folder has no weights.

    Example:
        >>> reward = SentimentReward()
        >>> scores = reward(["The film was"] * 2, [" moving, a delight.", " dreadful and dull."])
        >>> bool(scores[0] > 0 > scores[1])
        True
    """

    def __init__(
        self,
        model_name_or_path: str | Path | None = None,
        *,
        positive_label: str | None = None,
        score: Literal["log_odds", "logit"] = "log_odds",
        max_length: int | None = None,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        clamp: float | None = None,
    ) -> None:
        if score not in ("log_odds", "logit"):
            raise ValueError(f"score is {score!r}; use 'log_odds' or 'logit'")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp is {clamp}; give a positive number, or None for no limit")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; give at least 1, or None")
        name = str(EMBEDDED_REWARD if model_name_or_path is None else model_name_or_path)
        self.score = score
        self.batch_size = batch_size
        self.clamp = clamp
        self.model, self.tokenizer = _load(name)
        self.positive_id = _positive_id(self.model, name, positive_label)
        if score == "log_odds":
            _check_labels_exclude_each_other(self.model, name)
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {name} has no pad token; set one and save it again")
        # Causal classifiers read their score at the last token that is no padding, by this id.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(self.model.config, "max_position_embeddings", None) or -1
        readable = min(self.tokenizer.model_max_length, positions if positions > 0 else 10**9)
        self.max_length = readable if max_length is None else min(max_length, readable)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.eval().requires_grad_(False).to(self.device)
        self._check_padding(name)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores of prompt + response, float32 on the CPU. [B]"""
        if isinstance(prompts, str) or isinstance(responses, str):
            raise ValueError("a prompt or response is one text: give a list of each, [prompt]")
        if len(prompts) != len(responses):
            raise ValueError(
                f"{len(prompts)} prompts but {len(responses)} responses; give one prompt each"
            )
        logits = self._logits([p + r for p, r in zip(prompts, responses, strict=True)])
        scores = logits[:, self.positive_id] if self.score == "logit" else self._log_odds(logits)
        return scores if self.clamp is None else scores.clamp(-self.clamp, self.clamp)

    def probability_positive(self, texts: Sequence[str]) -> Tensor:
        """p(positive | text) in [0, 1], float32 on the CPU, without clamp. [B]"""
        if isinstance(texts, str):
            raise ValueError("texts is one text: give a list of them, [text]")
        _check_labels_exclude_each_other(self.model, self.model.config.name_or_path)
        return torch.sigmoid(self._log_odds(self._logits(texts)))

    def _check_padding(self, name: str) -> None:
        """Refuses a classifier, such as XLNet's, that reads its score off the padding."""
        short, long = "the film", "the film was " * 8
        alone, beside = self._logits([short])[0], self._logits([short, long])[0]
        if not torch.allclose(alone, beside, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"{name} gives a text another score beside a longer one: it reads the padding on "
                "the right (XLNet does), and cannot be used; name a classifier that masks it"
            )

    def _log_odds(self, logits: Tensor) -> Tensor:
        others = torch.arange(logits.shape[1]) != self.positive_id
        return logits[:, self.positive_id] - logits[:, others].logsumexp(dim=1)

    @torch.no_grad()
    def _logits(self, texts: Sequence[str]) -> Tensor:
        """Logits of all labels, float32 on the CPU; neighbours in a batch have similar length."""
        logits = torch.empty(len(texts), self.model.config.num_labels)
        if len(texts) == 0:
            return logits
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for begin in range(0, len(order), self.batch_size):
            index = order[begin : begin + self.batch_size]
            # On the right: positions of many models count padding that stands before the text.
            batch = self.tokenizer.pad(
                {"input_ids": [rows[i] for i in index]},
                padding=True,
                padding_side="right",
                return_tensors="pt",
            ).to(self.device)
            output = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
            logits[index] = output.logits.float().cpu()
        return logits


def _load(name: str):
    """The classifier in float32 and its tokenizer; what is missing is named in one line."""
    if Path(name).is_dir() and not any(any(Path(name).glob(kind)) for kind in _WEIGHTS):
        raise FileNotFoundError(
            f"the folder {name} has no model weights (model.safetensors); save a classifier there "
            f"with save_pretrained, or name another reward model"
        )
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a missing head is an error below, not a warning
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise OSError(f"reward model {name}: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(
            f"{name} is not a trained sequence classifier, its weights lack {missing}; "
            f"name a model fine-tuned with a classification head"
        )
    return model, tokenizer


def _positive_id(model: PreTrainedModel, name: str, positive_label: str | None) -> int:
    """Index of the positive label, by name; a model with one output needs none."""
    labels: dict[int, str] = {int(i): label for i, label in (model.config.id2label or {}).items()}
    if len(labels) == 1 and positive_label is None:
        return 0
    wanted = _POSITIVE_NAMES if positive_label is None else (positive_label.lower(),)
    found = [i for i, label in labels.items() if label.lower() in wanted]
    if len(found) != 1:
        raise ValueError(
            f"{name} has no label {positive_label or 'positive'!r} among {list(labels.values())}; "
            f"set positive_label to the one that should score high"
        )
    return found[0]


def _check_labels_exclude_each_other(model: PreTrainedModel, name: str) -> None:
    """Log-odds over labels need a softmax over at least two of them."""
    if model.config.num_labels == 1:
        raise ValueError(
            f"{name} has one output and no log-odds; use score='logit', its raw output"
        )
    if model.config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{name} is a multi-label classifier, whose labels do not exclude each other; "
            f"use score='logit', the log-odds of the positive label on its own"
        )
