"""Floating-point floors of a PPO update: what the matrix products alone take on this machine.

The *bare* floor multiplies matrices of the shapes that a GPT-2 trunk and head multiply (torch.mm on
preallocated outputs, torch.bmm for the attention); the *module* floor runs the transformers module
itself, forward or forward and backward, with nothing around it. What a trainer takes beyond the
module is the trainer's; what the module takes beyond the bare products is memory traffic,
activations and dispatch.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class StepShape:
    """Sizes of an update that decide its matrix products."""

    batch: int
    """B: responses."""
    prompt: int
    """P: tokens of the longest prompt."""
    response: int
    """T: tokens of a response."""
    width: int
    """H"""
    inner: int
    """Width of the MLP."""
    layers: int
    heads: int
    vocab: int
    """V"""

    @classmethod
    def of(cls, config: Any, batch: int, prompt: int, response: int) -> "StepShape":
        """Reads the sizes off a GPT-2 config."""
        return cls(
            batch=batch,
            prompt=prompt,
            response=response,
            width=config.n_embd,
            inner=config.n_inner or 4 * config.n_embd,
            layers=config.n_layer,
            heads=config.n_head,
            vocab=config.vocab_size,
        )


def median_seconds(run: Callable[[], Any], repetitions: int) -> float:
    """Median wall-clock seconds, after one call that warms up."""
    run()
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def product_seconds(
    rows: int, inner: int, columns: int, dtype: torch.dtype, backward: bool
) -> float:
    """[rows, inner] @ [inner, columns]; with `backward` also both gradient products."""
    x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    g = torch.randn(rows, columns, dtype=dtype)
    y, gx, gw = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w, out=y)
        if backward:
            torch.mm(g, w.t(), out=gx)
            torch.mm(x.t(), g, out=gw)

    return median_seconds(run, 7)


def attention_seconds(
    batch: int, queries: int, keys: int, width: int, dtype: torch.dtype, backward: bool
) -> float:
    """q kᵀ and p v of `batch` heads; the backward is four products of the same size."""
    q, k = (
        torch.randn(batch, queries, width, dtype=dtype),
        torch.randn(batch, keys, width, dtype=dtype),
    )
    p = torch.randn(batch, queries, keys, dtype=dtype)

    def run() -> None:
        for _ in range(3 if backward else 1):
            torch.bmm(q, k.transpose(1, 2))
            torch.bmm(p, k)

    return median_seconds(run, 7)


def trunk_floor(
    shape: StepShape, rows: int, queries: int, keys: int, dtype: torch.dtype, backward: bool
) -> float:
    """Matrix products of the whole trunk on `rows` tokens."""
    layer = sum(
        product_seconds(rows, inner, columns, dtype, backward)
        for inner, columns in (
            (shape.width, 3 * shape.width),
            (shape.width, shape.width),
            (shape.width, shape.inner),
            (shape.inner, shape.width),
        )
    )
    head_batch, head_width = shape.batch * shape.heads, shape.width // shape.heads
    layer += attention_seconds(head_batch, queries, keys, head_width, dtype, backward)
    return shape.layers * layer


def step_floors(shape: StepShape, epochs: int, dtype: torch.dtype) -> dict[str, float]:
    """Bare products of each part of an update, in seconds.

    The head is always multiplied in float32 (the log-probabilities are); `dtype` is the trunk's.
    """
    prefixes = shape.prompt + shape.response - 1
    rows, tokens = shape.batch * prefixes, shape.batch * shape.response
    prefill = trunk_floor(
        shape, shape.batch * shape.prompt, shape.prompt, shape.prompt, dtype, backward=False
    )
    token = trunk_floor(shape, shape.batch, 1, prefixes, dtype, backward=False)
    token_head = product_seconds(shape.batch, shape.width, shape.vocab, torch.float32, False)
    forward = trunk_floor(shape, rows, prefixes, prefixes, dtype, backward=False)
    both = trunk_floor(shape, rows, prefixes, prefixes, dtype, backward=True)
    head = product_seconds(tokens, shape.width, shape.vocab, torch.float32, backward=False)
    head_both = product_seconds(tokens, shape.width, shape.vocab, torch.float32, backward=True)
    return {
        "generation": prefill + (shape.response - 1) * token + shape.response * token_head,
        "sampling_heads": shape.response * token_head,
        "statistics": 2 * (forward + head),
        "optimisation": epochs * (both + head_both),
        "trunk_forward": forward,
        "trunk_forward_backward": both,
        "head_forward": head,
        "head_forward_backward": head_both,
    }


def module_floors(model: Any, shape: StepShape, epochs: int, bf16: bool) -> dict[str, float]:
    """Seconds of the transformers trunk itself on as many tokens; its cache in generation."""
    prefixes = shape.prompt + shape.response - 1
    ids = torch.randint(shape.vocab, (shape.batch, prefixes))
    mask = torch.ones_like(ids)
    positions = torch.arange(prefixes).expand_as(ids)
    trunk = model.base_model

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return trunk(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state

    gradient = torch.randn(shape.batch, prefixes, shape.width)

    def generate() -> None:
        cache = DynamicCache(config=model.config)
        begin = 0
        for end in range(shape.prompt, prefixes + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                trunk(
                    input_ids=ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                    use_cache=True,
                )
            begin = end

    def both() -> None:
        hidden = forward()
        hidden.backward(gradient.to(hidden.dtype))
        model.zero_grad()

    with torch.no_grad():
        one_way = median_seconds(forward, 5)
        sampling = median_seconds(generate, 3)
    two_ways = median_seconds(both, 5)
    return {
        "trunk_forward": one_way,
        "trunk_forward_backward": two_ways,
        "generation": sampling,
        "statistics": 2 * one_way,
        "optimisation": epochs * two_ways,
    }
