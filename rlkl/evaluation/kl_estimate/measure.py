"""What policy and reference say about a batch of responses: every token-level estimate, and where
the KL comes from.

Both distributions exist for one chunk of tokens at a time, in the fused kernel, in float32 (float64
for float64 weights). It reduces them to log-probabilities and the exact KL per token; what else is
asked of them is read off its logits: estimators of whole distributions, sums over the vocabulary.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlkl.kl import (
    ESTIMATORS,
    ModuleHead,
    RaoBlackwellEstimator,
    SampledEstimator,
    fused_token_stats,
    reverse_kl_terms,
)
from rlkl.models import ModelPair, output_head, response_hidden
from rlkl.rollout import Responses, scatter_tokens

_CHUNK_ELEMENTS = 4_000_000
"""Logits of one model in memory at once."""
_OF_DISTRIBUTIONS = {
    name: estimator
    for name, estimator in ESTIMATORS.items()
    if not isinstance(estimator, SampledEstimator | RaoBlackwellEstimator)
}


@dataclass(frozen=True)
class Measured:
    """Numbers per response token, float64 on the CPU; 0 where masked."""

    k: dict[str, Tensor]
    """[B, T] nats by estimator; ``rb`` is D_t, ``k1`` is u_t."""
    policy_logp: Tensor
    """[B, T] log π(y_t | h_t)."""
    ref_logp: Tensor
    """[B, T] log q(y_t | h_t)."""
    mask: Tensor
    """[B, T] bool."""


@dataclass(frozen=True, order=True)
class Context:
    """A prefix at which the two next-token distributions are far apart."""

    kl: float
    """D_t there, in nats."""
    order: int
    """Breaks ties: contexts are kept in the order in which they were met."""
    text: str = field(compare=False)
    """The end of the prefix."""
    policy_top: list[tuple[int, float, float]] = field(compare=False)
    """The policy's likeliest tokens: id, π, q."""
    ref_top: list[tuple[int, float, float]] = field(compare=False)
    """The reference's likeliest tokens: id, π, q."""


class VocabularySums:
    """Which tokens the KL comes from: sums over all visited prefixes, one number per token.

    The share of a token is that of `rlkl.kl.reverse_kl_terms`: never negative, whether the policy
    has raised the token or lowered it, and together they are D_t.
    """

    def __init__(self, contexts: int = 10) -> None:
        self.tokens = 0
        # [V] each; a single 0 until the first prefix says how large the vocabulary is.
        self.contribution, self.policy, self.ref = torch.zeros(3, 1, dtype=torch.float64)
        self._contexts: list[Context] = []
        self._limit, self._order = contexts, itertools.count()

    def add(self, terms: Tensor, policy_logp: Tensor, ref_logp: Tensor) -> None:
        """Adds `reverse_kl_terms` and the distributions, [n, V] each, at n prefixes."""
        self.contribution = self.contribution + _column_sums(terms)
        self.policy = self.policy + _column_sums(policy_logp.exp())
        self.ref = self.ref + _column_sums(ref_logp.exp())
        self.tokens += len(terms)

    def offer_contexts(
        self, kl: Tensor, policy_logp: Tensor, ref_logp: Tensor, prefix_text: Callable[[int], str]
    ) -> None:
        """Keeps the prefixes with the largest D_t; `prefix_text(i)` is asked for those only."""
        values, index = kl.topk(min(self._limit, len(kl)))
        for value, i in zip(values.tolist(), index.tolist(), strict=True):
            if len(self._contexts) == self._limit and value <= self._contexts[0].kl:
                return
            p, q = policy_logp[i].exp(), ref_logp[i].exp()
            tops = [
                [(v, float(p[v]), float(q[v])) for v in x.topk(min(3, len(x))).indices.tolist()]
                for x in (p, q)
            ]
            text = prefix_text(i)
            if any(text == c.text for c in self._contexts):
                continue
            context = Context(value, -next(self._order), text, *tops)
            if len(self._contexts) < self._limit:
                heapq.heappush(self._contexts, context)
            else:
                heapq.heappushpop(self._contexts, context)

    @property
    def contexts(self) -> list[Context]:
        """The prefixes kept, the largest D_t first."""
        return sorted(self._contexts, reverse=True)


def _column_sums(rows: Tensor) -> Tensor:
    return rows.sum(0).double().cpu()


@torch.no_grad()
def measure(
    pair: ModelPair,
    responses: Responses,
    temperature: float,
    vocabulary: VocabularySums | None = None,
) -> Measured:
    """Every token-level estimate at every response token; one pass of each trunk.

    Args:
        pair: policy and reference.
        responses: what the policy sampled at `temperature`.
        temperature: all logits are divided by it.
        vocabulary: takes the sums over the vocabulary, if wanted.
    """
    mask = responses.mask
    ids, attention, length = responses.input_ids, responses.attention_mask, mask.shape[1]
    hidden, heads = [], []
    for side in (pair.policy, pair.ref):
        with side.active() as model:
            hidden.append(response_hidden(model, ids, attention, length)[mask])
            heads.append(output_head(model))
    if pair.policy.model is pair.ref.model and any(isinstance(h, ModuleHead) for h in heads):
        raise ValueError(
            "the head's logits depend on which adapter is on, and both are needed at once: load "
            "the reference as a model of its own"
        )
    tokens = responses.tokens[mask]
    parts: dict[str, list[Tensor]] = {name: [] for name in _OF_DISTRIBUTIONS}

    def read(rows: slice, *logits: Tensor) -> None:
        policy_logp, ref_logp = (x.log_softmax(-1) for x in logits)
        real = torch.ones_like(tokens[rows], dtype=torch.bool)[None]
        for name, estimator in _OF_DISTRIBUTIONS.items():
            k = estimator(policy_logp[None], ref_logp[None], tokens[None, rows], real)
            parts[name].append(k[0])
        if vocabulary is not None:
            terms = reverse_kl_terms(policy_logp, ref_logp)
            vocabulary.add(terms, policy_logp, ref_logp)
            vocabulary.offer_contexts(
                terms.sum(-1).double(),
                policy_logp,
                ref_logp,
                lambda i: _prefix(pair, responses, rows.start + i),
            )

    stats = fused_token_stats(
        hidden[0],
        heads[0],
        hidden[1],
        heads[1],
        tokens,
        temperature=temperature,
        vocab_size=pair.vocab_size,
        chunk_size=max(1, _CHUNK_ELEMENTS // len(pair.tokenizer)),
        on_logits=read,
    )
    k = {name: torch.cat(values) for name, values in parts.items()}
    k |= {"policy_logp": stats.policy_logp, "ref_logp": stats.ref_logp, "rb": stats.kl}
    k = {name: x.double() for name, x in k.items()}
    for name, estimator in ESTIMATORS.items():
        if isinstance(estimator, SampledEstimator):
            k[name] = estimator.from_token_logp(k["policy_logp"], k["ref_logp"])
    whole = {name: scatter_tokens(x, mask).cpu() for name, x in k.items()}
    return Measured(
        k={name: whole[name] for name in ESTIMATORS},
        policy_logp=whole["policy_logp"],
        ref_logp=whole["ref_logp"],
        mask=mask.cpu(),
    )


def _prefix(pair: ModelPair, responses: Responses, token: int, words: int = 24) -> str:
    """The end of the text before the `token`-th real token of a batch."""
    row, position = responses.mask.nonzero()[token].tolist()
    prompt = responses.prompt_ids[row][responses.prompt_mask[row]]
    ids = torch.cat([prompt, responses.tokens[row, :position]])[-words:]
    return str(pair.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
