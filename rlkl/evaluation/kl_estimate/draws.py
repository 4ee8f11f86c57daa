"""Where responses come from: sampled here, batch by batch, or read from a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlkl.models import ModelPair
from rlkl.models.language_model import max_positions
from rlkl.rollout import Responses, encode_prompts, sample_responses
from rlkl.rollout.randomness import generator_of


@dataclass(frozen=True)
class Draws:
    """A batch of responses, and what is known of how they were drawn."""

    responses: Responses
    prompt: Tensor
    """[B] number of the prompt: different ones are counted from 0 as they come first."""
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

    The last token is not read: no other follows it.

    Raises:
        ValueError: it says by how much, and what to shorten.
    """
    limit = min(max_positions(model) for model in pair.modules())
    if longest - 1 > limit:
        raise ValueError(
            f"{what} makes {longest} tokens, but the models take {limit} and one to end with: "
            "shorten it"
        )


class SampledResponses:
    """Responses of the policy, one to each prompt in an order shuffled by the seed, and again.

    A prompt that the list repeats is one prompt: its responses are not independent draws of it.

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
        max_prompt_length: int | None = None,
    ) -> None:
        check_positive(num_samples=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if max_prompt_length is not None:
            check_positive(max_prompt_length=max_prompt_length)
        self.pair, self.prompts, self.limit, self.max_tokens = pair, prompts, limit, max_new_tokens
        self.temperature, self.seed, self.batch_size = temperature, seed, batch_size
        self.max_prompt_length = max_prompt_length
        _, mask = encode_prompts(pair.tokenizer, prompts, max_prompt_length)
        longest = int(mask.sum(1).max())
        what = f"the longest prompt ({longest} tokens) with max_new_tokens={max_new_tokens}"
        check_length(pair, longest + max_new_tokens, what)
        self._order = torch.randperm(len(prompts), generator=generator_of("cpu", seed)).tolist()
        numbers: dict[str, int] = {}
        for i in self._order[:limit]:
            numbers.setdefault(prompts[i], len(numbers))
        self._numbers, self.num_prompts = numbers, len(numbers)
        self.notes = (
            f"The KL is that of the first {max_new_tokens} tokens of a response; what would come "
            "after them is not counted.",
        )

    def batches(self) -> Iterator[Draws]:
        """Batches until the limit; each depends on the seed and its place, not on those before."""
        seen = [0] * self.num_prompts
        for drawn in range(0, self.limit, self.batch_size):
            places = range(drawn, min(drawn + self.batch_size, self.limit))
            prompts = [self.prompts[self._order[i % len(self._order)]] for i in places]
            numbers, repetitions = [self._numbers[prompt] for prompt in prompts], []
            for number in numbers:
                repetitions.append(seen[number])
                seen[number] += 1
            with self.pair.policy.active() as model:
                device = next(model.parameters()).device
                responses = sample_responses(
                    model,
                    self.pair.tokenizer,
                    prompts,
                    self.max_tokens,
                    temperature=self.temperature,
                    generator=generator_of(device, self.seed, drawn),
                    batch_size=self.batch_size,
                    max_prompt_length=self.max_prompt_length,
                    vocab_size=self.pair.vocab_size,
                )
            yield Draws(responses, torch.tensor(numbers), torch.tensor(repetitions))
