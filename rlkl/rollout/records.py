"""The records that flow through a step, with their shapes. B responses, P prompt and T response
tokens.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def scatter_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Puts the values of the real tokens back in their places, 0 where masked.

    [N, ...], [B, T] -> [B, T, ...]

    >>> scatter_tokens(torch.tensor([1.0, 2.0]), torch.tensor([[True, False], [True, False]]))
    tensor([[1., 0.],
            [2., 0.]])
    """
    whole = values.new_zeros(*mask.shape, *values.shape[1:])
    whole[mask] = values
    return whole


@dataclass(frozen=True)
class Responses:
    """Sampled responses: what the policy said."""

    prompts: list[str]
    texts: list[str]
    """Responses as they read after their prompts, special tokens left out."""
    prompt_ids: Tensor
    """[B, P], left-padded."""
    prompt_mask: Tensor
    """[B, P] bool."""
    tokens: Tensor
    """[B, T], right-padded; an end-of-text token that was sampled is part of the response."""
    mask: Tensor
    """[B, T] bool: True at real tokens. Never read off the token ids: pad may equal eos."""
    ended: Tensor
    """[B] bool: the response ended by itself; False where it was cut at the length limit."""

    @property
    def input_ids(self) -> Tensor:
        """[B, P + T]."""
        return torch.cat([self.prompt_ids, self.tokens], 1)

    @property
    def attention_mask(self) -> Tensor:
        """[B, P + T] bool."""
        return torch.cat([self.prompt_mask, self.mask], 1)

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, index: Tensor) -> "Responses":
        """The responses at `index`, less the columns that are padding in all of them."""
        taken: Responses = _take(self, index)
        width, length = int(taken.prompt_mask.sum(1).max()), int(taken.mask.sum(1).max())
        return replace(
            taken,
            prompt_ids=taken.prompt_ids[:, -width:],
            prompt_mask=taken.prompt_mask[:, -width:],
            tokens=taken.tokens[:, :length],
            mask=taken.mask[:, :length],
        )


@dataclass(frozen=True)
class TokenRecord:
    """What policy, reference and critic say about each response token; 0 where masked."""

    policy_logp: Tensor
    """[B, T] log π(y_t | h_t)."""
    ref_logp: Tensor
    """[B, T] log q(y_t | h_t)."""
    kl: Tensor
    """[B, T] exact D_KL(π ‖ q) of the next-token distributions at h_t, in nats."""
    entropy: Tensor
    """[B, T] entropy of π(· | h_t), in nats."""
    ref_hidden: Tensor
    """[B, T, H] hidden states of the reference, in its own dtype (so that its logits are the same
    to the last bit later): small enough to keep over the epochs, as logits are not."""
    values: Tensor | None = None
    """[B, T] V(h_t), where there is a critic."""


@dataclass(frozen=True)
class Rollout:
    """A batch of scored and measured responses."""

    responses: Responses
    scores: Tensor
    """[B] the reward model's score, before any penalty."""
    tokens: TokenRecord
    other_scores: dict[str, Tensor]
    """Scores of the judges, by name: reported, never trained on. [B] each."""

    def __len__(self) -> int:
        return len(self.responses)


def _take(value, index: Tensor):
    """Rows of every tensor and list in a record."""
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, list):
        return [value[i] for i in index.tolist()]
    if isinstance(value, dict):
        return {key: _take(item, index) for key, item in value.items()}
    if value is None:
        return None
    return replace(value, **{f.name: _take(getattr(value, f.name), index) for f in fields(value)})
