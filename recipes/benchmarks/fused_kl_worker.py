"""One variant of the token KL, measured in this process; called by fused_kl.py.

    python recipes/benchmarks/fused_kl_worker.py '{"variant": "fused", "gradient": true, ...}'

Prints "ready" once everything is loaded, then for every line that it reads one call's measurement
as a line of JSON: wall and CPU seconds, and the peak of the process's memory above what it held
before the call (its inputs), in MB.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

KL_COEF = 0.1


class Inputs(NamedTuple):
    """Last hidden states and heads of a policy and a reference that is a little way off."""

    hidden: Tensor
    head: Tensor
    ref_hidden: Tensor
    ref_head: Tensor
    tokens: Tensor
    old_logp: Tensor
    advantage: Tensor


def make_inputs(n: int, vocab: int, width: int, gradient: bool) -> Inputs:
    """Logits of standard deviation 2; the KL is about 0.05 nats per token."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=draw)
    head = torch.randn(vocab, width, generator=draw).mul_(2 / width**0.5)
    ref_hidden = hidden + 0.16 * torch.randn(n, width, generator=draw)
    tokens = torch.randint(vocab, (n,), generator=draw)
    old_logp, advantage = torch.full((n,), -11.0), torch.randn(n, generator=draw)
    if gradient:
        hidden.requires_grad_()
        head.requires_grad_()
    # A head of its own: a shared one would halve what the reference's product reads.
    return Inputs(hidden, head, ref_hidden, head.detach().clone(), tokens, old_logp, advantage)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """PPO's clipped loss, per token."""
    ratio = (logp - old_logp).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))


# ---- variants: each returns what it measures, and leaves gradients if asked ----------------------


def naive_kl(hidden: Tensor, head: Tensor, ref_hidden: Tensor, ref_head: Tensor, tokens: Tensor):
    """The definitions on [N, V]: exact KL and log π(y)."""
    logp = (hidden @ head.t()).log_softmax(-1)
    with torch.no_grad():
        ref_logp = (ref_hidden @ ref_head.t()).log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    return kl, logp.gather(1, tokens[:, None])[:, 0]


def naive_sampled(
    hidden: Tensor, head: Tensor, ref_hidden: Tensor, ref_head: Tensor, tokens: Tensor
):
    """The sampled log-ratio and log π(y), on [N, V]."""
    logp = (hidden @ head.t()).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    with torch.no_grad():
        ref_logp = (ref_hidden @ ref_head.t()).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return logp - ref_logp, logp


def whole(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Inputs, bool], None]:
    """A variant that has the statistics first and differentiates the loss of them after."""

    def run(x: Inputs, gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            kl, logp = function(x.hidden, x.head, x.ref_hidden, x.ref_head, x.tokens)
            loss = (policy_loss(logp, x.old_logp, x.advantage) + KL_COEF * kl).sum() / len(kl)
        if gradient:
            loss.backward()

    return run


def fused(x: Inputs, gradient: bool) -> None:
    """Exact KL; gradients made in the forward pass."""
    from rlkl.kl import fused_token_loss, fused_token_stats

    if not gradient:
        with torch.no_grad():
            fused_token_stats(x.hidden, x.head, x.ref_hidden, x.ref_head, x.tokens)
        return

    def loss(stats: Any, old_logp: Tensor, advantage: Tensor) -> Tensor:
        loss = policy_loss(stats.policy_logp, old_logp, advantage) + KL_COEF * stats.kl
        return loss.sum() / len(x.tokens)

    fused_token_loss(
        loss, x.hidden, x.head, x.ref_hidden, x.ref_head, x.tokens, x.old_logp, x.advantage
    )[0].backward()


def fused_recompute(x: Inputs, gradient: bool) -> None:
    """Exact KL for any later loss: the logits are multiplied again in the backward pass."""
    from rlkl.kl import fused_token_stats

    def statistics(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        stats = fused_token_stats(*inputs)
        return stats.kl, stats.policy_logp

    whole(statistics)(x, gradient)


def fused_sampled(x: Inputs, gradient: bool) -> None:
    """Sampled KL by the same engine: log π(y), and log q(y), which takes the reference's head."""
    from rlkl.kl import fused_logp_loss, fused_token_logp

    with torch.no_grad():
        ref_logp = fused_token_logp(x.ref_hidden, x.ref_head, x.tokens).policy_logp
        if not gradient:
            fused_token_logp(x.hidden, x.head, x.tokens)
            return

    def loss(stats: Any, old_logp: Tensor, advantage: Tensor, ref_logp: Tensor) -> Tensor:
        loss = policy_loss(stats.policy_logp, old_logp, advantage)
        return (loss + KL_COEF * (stats.policy_logp - ref_logp)).sum() / len(x.tokens)

    fused_logp_loss(loss, x.hidden, x.head, x.tokens, x.old_logp, x.advantage, ref_logp)[
        0
    ].backward()


def bare_products(x: Inputs, gradient: bool) -> None:
    """The matrix products alone, in the shapes that the engine gives them: its floor."""
    from rlkl.kl.fused import heads, problem, tiles

    n, (vocab, width) = len(x.tokens), x.head.shape
    head, ref_head, step = x.head.detach(), x.ref_head, heads._VOCAB_SLICE
    rows = problem.default_chunk_size(vocab, n) if gradient else tiles._TILE_ROWS
    columns = vocab if gradient else tiles._TILE_ELEMENTS // rows
    logits = torch.empty(2, min(rows, n), columns)
    hidden_sum = torch.zeros(n, width) if gradient else None
    head_sum = torch.zeros_like(head) if gradient else None
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        a, b = logits[:, : part.stop - part.start]
        hidden, ref_hidden = x.hidden.detach()[part], x.ref_hidden[part]
        for first in range(0, vocab, columns):
            for out, states, weight in ((a, hidden, head), (b, ref_hidden, ref_head)):
                weight = weight[first : first + columns]
                for at in range(0, len(weight), step):
                    piece = weight[at : at + step]
                    torch.mm(states, piece.t(), out=out[:, at : at + len(piece)])
        if hidden_sum is not None and head_sum is not None:
            for at in range(0, vocab, step):
                hidden_sum[part].addmm_(a[:, at : at + step], head[at : at + step])
            head_sum.addmm_(a.t(), hidden)


def compiled(x: Inputs, gradient: bool) -> None:
    """The naive formulas through torch.compile (compiled by the warm-up)."""
    whole(_compiled_kl)(x, gradient)


_compiled_kl = torch.compile(naive_kl, dynamic=True)


def trl(x: Inputs, gradient: bool) -> None:
    """TRL's chunked reverse KL. It gives no log π(y): its loss is the KL alone."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    with torch.set_grad_enabled(gradient):
        kl, _ = ChunkedDivergenceFunction.apply(
            x.hidden, x.head, None, x.ref_hidden, x.ref_head, None, 1.0
        )
    if gradient:
        kl.mean().backward()


def liger(x: Inputs, gradient: bool) -> None:
    """Liger's chunked Jensen–Shannon divergence at its reverse-KL end; no log π(y) either."""
    from liger_kernel.chunked_loss.jsd_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearJSDFunction,
    )

    with torch.set_grad_enabled(gradient):
        loss = LigerFusedLinearJSDFunction.apply(
            x.hidden, x.head, x.ref_hidden, x.ref_head, x.tokens, None, None, 0.0, 1.0, 1.0
        )
    if gradient:
        (loss[0] if isinstance(loss, tuple) else loss).backward()


VARIANTS: dict[str, Callable[[Inputs, bool], None]] = {
    "naive": whole(naive_kl),
    "naive_sampled": whole(naive_sampled),
    "compiled": compiled,
    "fused": fused,
    "fused_recompute": fused_recompute,
    "fused_sampled": fused_sampled,
    "bare_products": bare_products,
    "trl": trl,
    "liger": liger,
}


# ---- a whole PPO step ----------------------------------------------------------------------------


def ppo_step(spec: dict[str, Any]) -> Callable[[], None]:
    """A PPO update of a small GPT-2 with a large vocabulary: sample, measure, four epochs.

    fused: exact KL in reward and loss. naive: k1 in the reward, from whole logits.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlkl.kl import fused_token_loss, fused_token_stats
    from rlkl.models import frozen_copy, response_hidden
    from rlkl.rollout.sampling import sample_tokens

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=spec["vocab"],
        n_embd=spec["width"],
        n_layer=4,
        n_head=max(1, spec["width"] // 64),
        n_positions=64,
    )
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).eval()
    ref = frozen_copy(model)
    ref_head = cast(nn.Linear, ref.lm_head).weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch, prompt_length, length = spec["n"] // 24, 8, 24
    prompts = torch.randint(1, spec["vocab"], (batch, prompt_length))
    mask = torch.ones(batch, prompt_length, dtype=torch.bool)
    exact = spec["variant"] == "ppo_fused"

    def step() -> None:
        generator = torch.Generator().manual_seed(0)
        tokens, real, _ = sample_tokens(
            model,
            prompts,
            mask,
            length,
            eos_token_ids=[0],
            pad_token_id=0,
            temperature=1.0,
            generator=generator,
        )
        ids = torch.cat([prompts, tokens], 1)
        attention = torch.cat([mask, real], 1)
        y, head = tokens[real], model.lm_head.weight
        with torch.no_grad():
            hidden = response_hidden(model, ids, attention, length)[real]
            ref_hidden = response_hidden(ref, ids, attention, length)[real]
            if exact:
                stats = fused_token_stats(hidden, head, ref_hidden, ref_head, y, whole_rows=True)
                kl, old_logp, ref_logp = stats.kl, stats.policy_logp, stats.ref_logp
            else:
                kl, old_logp = naive_sampled(hidden, head, ref_hidden, ref_head, y)
                ref_logp = old_logp - kl
        advantage = torch.randn(len(y), generator=generator) - KL_COEF * kl
        for _ in range(4):
            hidden = response_hidden(model, ids, attention, length)[real]
            if exact:

                def loss_fn(stats: Any, old_logp: Tensor, advantage: Tensor) -> Tensor:
                    loss = policy_loss(stats.policy_logp, old_logp, advantage)
                    return (loss + KL_COEF * stats.kl).sum() / len(y)

                loss, _ = fused_token_loss(
                    loss_fn,
                    hidden,
                    head,
                    ref_hidden,
                    ref_head,
                    y,
                    old_logp,
                    advantage,
                    ref_logp=ref_logp,
                )
            else:
                logp = (hidden @ head.t()).log_softmax(-1).gather(1, y[:, None])[:, 0]
                loss = policy_loss(logp, old_logp, advantage).sum() / len(y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


# ---- measuring -----------------------------------------------------------------------------------


def resident_mb(field: str) -> float:
    """A memory field of this process in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{field} is not in /proc/self/status")


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of one call, and the peak memory it added."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "memory_mb": resident_mb("VmHWM") - before}


def prepare(spec: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """What measures one call; it has been called once, small where it can be.

    That starts threads, loads the libraries and compiles.
    """
    if spec["variant"].startswith("ppo_"):
        step = ppo_step(spec)
        step()
        return lambda: measure(step)
    variant, gradient = VARIANTS[spec["variant"]], spec["gradient"]
    variant(make_inputs(min(spec["n"], 96), spec["vocab"], spec["width"], gradient), gradient)
    inputs = make_inputs(spec["n"], spec["vocab"], spec["width"], gradient)

    def call() -> dict[str, float]:
        inputs.hidden.grad = inputs.head.grad = None
        return measure(lambda: variant(inputs, gradient))

    return call


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    call = prepare(spec)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(call()), flush=True)


if __name__ == "__main__":
    main()
