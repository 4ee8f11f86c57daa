"""The records that flow through a step, with their shapes. B responses, P prompt and T response
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


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
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """What the data says of each prompt besides, by column, for rewards that read it. B each."""

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
        taken: Responses = _mapped(
            self, lambda tensor: tensor[index], lambda row: [row[i] for i in index.tolist()]
        )
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


def moved(record: Record, device: torch.device | str) -> Record:
    """The same record with its tensors on a device."""
    return _mapped(record, lambda tensor: tensor.to(device))


def joined(parts: Sequence[Record]) -> Record:
    """Records of one kind as one, rows under rows; the shorter ones are padded.

    Example:
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> _join([mask, mask[:, :1]])
        tensor([[ True,  True],
                [ True, False]])
    """
    return _join(parts)


def _join(values: Sequence[Any], left: bool = False) -> Any:
    """Columns are padded by 0, on the left or on the right."""
    first = values[0]
    if isinstance(first, Tensor):
        width = max(value.shape[1] if value.ndim > 1 else 0 for value in values)
        return torch.cat([_padded(value, width, left) for value in values])
    if isinstance(first, list):
        return list(chain.from_iterable(values))
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):  # a NamedTuple
        return type(first)(*(_join(column, left) for column in zip(*values, strict=True)))
    if first is None:
        return None
    return replace(
        first,
        **{
            f.name: _join([getattr(value, f.name) for value in values], f.name.startswith("prompt"))
            for f in fields(first)
        },
    )


def _padded(x: Tensor, width: int, left: bool) -> Tensor:
    if x.ndim == 1 or x.shape[1] == width:
        return x
    padding = x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])
    return torch.cat([padding, x] if left else [x, padding], 1)


def _mapped(
    value: Any,
    of_tensor: Callable[[Tensor], Tensor],
    of_list: Callable[[list[Any]], list[Any]] = list,
) -> Any:
    """A record with something else in place of every tensor and list in it."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, list):
        return of_list(value)
    if isinstance(value, dict):
        return {key: _mapped(item, of_tensor, of_list) for key, item in value.items()}
    if isinstance(value, tuple):  # a NamedTuple
        return type(value)(*(_mapped(item, of_tensor, of_list) for item in value))
    if value is None:
        return None
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(
        value, **{name: _mapped(part, of_tensor, of_list) for name, part in parts.items()}
    )
