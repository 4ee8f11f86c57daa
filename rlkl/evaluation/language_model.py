"""How well a language model predicts held-out text, and the trigram model it has to beat."""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlkl.models.tokenizers import padding_id


def openings(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[list[int]]:
    """Token ids of the first `length` tokens of each text, after the opening bos token."""
    rows = tokenizer(texts, truncation=True, max_length=length, add_special_tokens=False)
    return [[cast(int, tokenizer.bos_token_id), *row] for row in rows["input_ids"]]


def decoded_bytes(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> int:
    """UTF-8 bytes of the text that the tokens after the opening one stand for."""
    return sum(len(str(tokenizer.decode(row[1:])).encode()) for row in rows)


@torch.no_grad()
def nats_of_openings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int
) -> dict[str, float]:
    """Cross-entropy of the first `length` tokens of each text, in nats per token and per byte.

    Bytes are those of the same tokens, decoded, so that models with other tokenizers compare.
    """
    rows, nats, tokens = openings(tokenizer, texts, length), 0.0, 0
    for begin in range(0, len(rows), 64):
        batch = rows[begin : begin + 64]
        ids = torch.full((len(batch), length + 1), padding_id(tokenizer))
        real = torch.zeros(len(batch), length + 1, dtype=torch.bool)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor(row)
            real[i, : len(row)] = True
        logits = model(input_ids=ids[:, :-1], attention_mask=real[:, :-1].long()).logits.float()
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        nats += float(loss[real[:, 1:]].double().sum())
        tokens += int(real[:, 1:].sum())
    size = decoded_bytes(tokenizer, rows)
    return {"nats_per_token": nats / tokens, "nats_per_byte": nats / size, "tokens": tokens}


class TrigramLM:
    """Interpolated trigram model with absolute discounting: the baseline of the embedded LM.

    p(w | u v) = max(c(u v w) − d, 0) / c(u v) + d N₊(u v ·) / c(u v) · p(w | v), and so on down to
    unigrams with one added to every count; N₊ counts the distinct continuations. Where c(u v) = 0
    it is p(w | v). Source: Chen and Goodman (1999), An empirical study of smoothing techniques for
    language modeling, section 2.6.

    Args:
        ids: the training tokens, one row of all texts.
        vocab_size: V.
        discount: d in (0, 1).

    Example:
        >>> lm = TrigramLM(np.array([0, 1, 2, 0, 1, 2, 0, 1]), vocab_size=3)
        >>> probability = [np.exp(lm.logp(np.array([[0, 1, w]])))[0, 1] for w in range(3)]
        >>> round(float(sum(probability)), 6)
        1.0
    """

    def __init__(self, ids: np.ndarray, vocab_size: int, discount: float = 0.75) -> None:
        self.vocab_size, self.discount = vocab_size, discount
        ids = ids.astype(np.int64)
        self.unigram = (np.bincount(ids, minlength=vocab_size) + 1.0) / (len(ids) + vocab_size)
        bigrams = ids[:-1] * vocab_size + ids[1:]
        trigrams = bigrams[:-1] * vocab_size + ids[2:]
        self.levels = [self._counts(bigrams), self._counts(trigrams)]

    def _counts(self, ngrams: np.ndarray) -> tuple[np.ndarray, ...]:
        """Sorted n-grams with their counts; sorted contexts with total and distinct counts."""
        keys, counts = np.unique(ngrams, return_counts=True)
        contexts, first = np.unique(keys // self.vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first)
        distinct = np.diff(np.append(first, len(keys)))
        return keys, counts, contexts, totals, distinct

    def logp(self, rows: np.ndarray) -> np.ndarray:
        """Log-probability of each token after the first: [R, L] -> [R, L − 1], in nats."""
        rows = rows.astype(np.int64)
        p = self.unigram[rows[:, 1:]]
        for order, (keys, counts, contexts, totals, distinct) in enumerate(self.levels, start=1):
            context = rows[:, : rows.shape[1] - order].copy()
            for step in range(1, order):
                context = context * self.vocab_size + rows[:, step : rows.shape[1] - order + step]
            count = _look_up(keys, counts, context * self.vocab_size + rows[:, order:])
            total = _look_up(contexts, totals, context)
            rest = self.discount * _look_up(contexts, distinct, context)
            lower = p[:, order - 1 :]
            seen = np.maximum(total, 1)
            mixed = np.maximum(count - self.discount, 0) / seen + rest / seen * lower
            p = np.concatenate([p[:, : order - 1], np.where(total > 0, mixed, lower)], 1)
        return np.log(p)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is none; `keys` sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
