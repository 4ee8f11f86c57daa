"""Where the responses come from: sampled here, batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass

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
    """[B, T] log-probability of each token under the sampler; None: the policy sampled."""
    sampler_sequence_logp: Tensor | None = None
    """[B] the same of the whole response, where that is all there is."""


def context_length(pair: ModelPair) -> int | None:
    """Positions of the shorter of the two models; None where neither names a limit."""
    limits = [getattr(model.config, "max_position_embeddings", None) for model in pair.modules()]
    return min((limit for limit in limits if limit is not None), default=None)


def sampled(
    pair: ModelPair,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    limit: int,
) -> Iterator[Draws]:
    """Responses of the policy, one to each prompt in an order shuffled by the seed, and again.

    Shuffled, so that fewer samples than prompts are a random draw of the prompts and not the head
    of a sorted file. At most `limit` responses; the caller may stop before.

    Raises:
        ValueError: no prompts, an empty prompt, or a prompt that leaves no room for the response.
    """
    _, mask = encode_prompts(pair.tokenizer, prompts)
    positions, longest = context_length(pair), int(mask.sum(1).max())
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but "
            f"the models take {positions} in all: shorten the prompts or lower max_new_tokens"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))

    def batches() -> Iterator[Draws]:
        for drawn in range(0, limit, batch_size):
            number = torch.arange(drawn, min(drawn + batch_size, limit))
            prompt = order[number % len(prompts)]
            with pair.policy.active() as model:
                device = next(model.parameters()).device
                responses = sample_responses(
                    model,
                    pair.tokenizer,
                    [prompts[i] for i in prompt.tolist()],
                    max_new_tokens,
                    temperature=temperature,
                    generator=_generator(device, seed, drawn),
                    batch_size=batch_size,
                )
            yield Draws(responses, prompt, number // len(prompts))

    return batches()


def _generator(device: torch.device, seed: int, drawn: int) -> torch.Generator:
    """A stream of its own for each batch, so that a batch does not depend on those before it."""
    sequence = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(2**31, (), generator=sequence))
    return torch.Generator(device=device).manual_seed((offset << 24) + drawn)
