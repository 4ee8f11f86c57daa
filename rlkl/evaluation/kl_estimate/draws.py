"""Where responses come from: sampled here, batch by batch, or read from a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlkl.models import ModelPair
from rlkl.rollout import Responses, encode_prompts, sample_responses


@dataclass(frozen=True)
class Draws:
    """A batch of responses, and what is known of how they were drawn."""

    responses: Responses
    prompt: Tensor
    """[B] number of the prompt."""
    repetition: Tensor
    """[B] how many responses to that prompt came before."""
    sampler_logp: Tensor | None = None
    """[B, T] log-probability of each token under the sampler; None: the policy sampled, or only
    the whole response's is known."""
    sampler_response_logp: Tensor | None = None
    """[B] that of the whole response, where that is all there is."""


class ResponseSource(Protocol):
    """Something that gives responses, at most `limit` of them, to `num_prompts` prompts."""

    num_prompts: int
    limit: int
    max_tokens: int
    """Of a response."""
    notes: tuple[str, ...]
    """What a reader of the numbers has to know of them."""

    def batches(self) -> Iterator[Draws]:
        """The responses."""
        ...


def check_positive(**numbers: int) -> None:
    """Refuses numbers below 1, by name."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number}: must be at least 1")


def check_length(pair: ModelPair, longest: int, what: str) -> None:
    """Refuses more tokens than the shorter of the two models has positions for.

    Raises:
        ValueError: it says by how much, and what to shorten.
    """
    limits = [
        limit
        for model in pair.modules()
        if (limit := getattr(model.config, "max_position_embeddings", None)) is not None
    ]
    if limits and longest > min(limits):
        raise ValueError(
            f"{what} makes {longest} tokens, but the models take {min(limits)} in all: shorten it"
        )


class SampledResponses:
    """Responses of the policy, one to each prompt in an order shuffled by the seed, and again.

    Shuffled, so that fewer samples than prompts are a random draw of the prompts and not the head
    of a sorted file.

    Raises:
        ValueError: no prompts, an empty prompt, a prompt that leaves no room for the response, or a
            number below 1.
    """

    def __init__(
        self,
        pair: ModelPair,
        prompts: list[str],
        *,
        limit: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        batch_size: int,
    ) -> None:
        check_positive(num_samples=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.pair, self.prompts, self.limit, self.max_tokens = pair, prompts, limit, max_new_tokens
        self.temperature, self.seed, self.batch_size = temperature, seed, batch_size
        _, mask = encode_prompts(pair.tokenizer, prompts)
        longest = int(mask.sum(1).max())
        what = f"the longest prompt ({longest} tokens) with max_new_tokens={max_new_tokens}"
        check_length(pair, longest + max_new_tokens, what)
        self.num_prompts = min(len(prompts), limit)
        self.notes = (
            f"The KL is that of the first {max_new_tokens} tokens of a response; what would come "
            "after them is not counted.",
        )

    def batches(self) -> Iterator[Draws]:
        """Batches until the limit; each depends on the seed and its place, not on those before."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.prompts), generator=generator)
        stream = int(torch.randint(2**31, (), generator=generator))
        for drawn in range(0, self.limit, self.batch_size):
            number = torch.arange(drawn, min(drawn + self.batch_size, self.limit))
            prompt = number % len(order)
            with self.pair.policy.active() as model:
                device = next(model.parameters()).device
                responses = sample_responses(
                    model,
                    self.pair.tokenizer,
                    [self.prompts[i] for i in order[prompt].tolist()],
                    self.max_tokens,
                    temperature=self.temperature,
                    generator=torch.Generator(device=device).manual_seed((stream << 24) + drawn),
                    batch_size=self.batch_size,
                )
            yield Draws(responses, prompt, number // len(order))
