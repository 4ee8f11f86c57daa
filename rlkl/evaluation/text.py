"""Texts without a model: overlap with references (ROUGE-L), and diversity.

ROUGE-L is Google's `rouge-score`, BLEU is `sacrebleu`; distinct-n counts white-space words.
"""

from collections.abc import Sequence

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from rlkl.kl import MeanStderr, mean_and_stderr


def rouge_l(responses: Sequence[str], references: Sequence[str | Sequence[str]]) -> MeanStderr:
    """Mean F-measure of the longest common subsequence with the reference, in [0, 1].

    Words are stemmed (Porter). Where a response has several references, the best one counts.

    Reference: ROUGE: A Package for Automatic Evaluation of Summaries (Lin, 2004),
    https://aclanthology.org/W04-1013/.

    Returns:
        Mean over the responses with its standard error.

    Raises:
        ValueError: not one reference (or list of references) for each response.

    Example:
        >>> rouge_l(["the cat sat"], ["the cat sat down"]).mean  # P = 1, R = 3/4
        tensor(0.8571, dtype=torch.float64)
    """
    if len(responses) != len(references):
        raise ValueError(f"{len(responses)} responses and {len(references)} references: pair them")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = []
    for response, given in zip(responses, references, strict=True):
        targets = [given] if isinstance(given, str) else list(given)
        scores.append(scorer.score_multi(targets, response)["rougeL"].fmeasure)
    return mean_and_stderr(torch.tensor(scores, dtype=torch.float64))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams in the texts: 1 is no repetition at all.

    It falls as texts get more and longer; compare only equal numbers of texts of similar length.

    Reference: A Diversity-Promoting Objective Function for Neural Conversation Models (Li et al.,
    2016), https://arxiv.org/abs/1510.03055.

    Raises:
        ValueError: no text has n words.

    Example:
        >>> distinct_n(["a b a b", "a c"], 2)  # ab, ba, ab, ac
        0.75
    """
    words = [text.split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    if not grams:
        raise ValueError(f"none of the {len(texts)} texts has {n} words")
    return len(set(grams)) / len(grams)


def self_bleu(texts: Sequence[str], limit: int = 100) -> float:
    """Mean BLEU-4 of each text against all others, in [0, 100]: lower is more diverse.

    Of the first `limit` texts, since the cost is quadratic. Each text is smoothed as a sentence
    (sacrebleu's default, exponential).

    Reference: Texygen (Zhu et al., 2018), https://arxiv.org/abs/1802.01886.

    Raises:
        ValueError: fewer than two texts.

    Example:
        >>> round(self_bleu(["one and the same text", "one and the same text"]), 6)
        100.0
    """
    texts = list(texts)[:limit]
    if len(texts) < 2:
        raise ValueError(f"self-BLEU compares texts with each other; there is {len(texts)}")
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)
    ]
    return sum(scores) / len(scores)
