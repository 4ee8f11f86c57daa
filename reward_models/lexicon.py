"""A reward that needs no model: for tests and first steps."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

POSITIVE = frozenset(
    ["best", "enjoyed", "excellent", "good", "great", "loved", "superb", "wonderful"]
)
NEGATIVE = frozenset(["awful", "bad", "boring", "dreadful", "dull", "hated", "terrible", "worst"])


class LexiconReward:
    """Positive words minus negative words of the prompt and the response, as a count.

    >>> LexiconReward()(["The plot is "], ["great, the acting dull, the end superb."])
    tensor([1.])
    """

    def __init__(
        self, positive: frozenset[str] = POSITIVE, negative: frozenset[str] = NEGATIVE
    ) -> None:
        self.positive = positive
        self.negative = negative

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        counts = []
        for prompt, response in zip(prompts, responses, strict=True):
            words = re.findall(r"[a-z]+", (prompt + response).lower())
            counts.append(sum((word in self.positive) - (word in self.negative) for word in words))
        return torch.tensor(counts, dtype=torch.float32)
