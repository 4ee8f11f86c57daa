"""Sampled responses -> scores and exact token statistics of policy, reference and critic."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlkl.kl import fused_token_stats
from rlkl.models import Critic, output_head, reference_model, response_hidden
from rlkl.rollout.records import Responses, Rollout, TokenRecord, scatter_tokens
from rlkl.rollout.scoring import AnyReward, score_responses


class PolicyPass(NamedTuple):
    """One pass of the policy's trunk over the N response tokens of a batch, with its graph."""

    hidden: Tensor
    """[N, H] states from which the tokens are predicted."""
    values: Tensor | None
    """[N] V(h_t) in float32, where there is a critic."""


def policy_pass(
    policy: nn.Module,
    critic: Critic | None,
    batch: Responses,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> PolicyPass:
    """Hidden states and values of a batch's response tokens: one pass for policy and critic.

    Differentiable in both models' parameters.
    """
    ids, attention = batch.input_ids, batch.attention_mask
    with autocast():
        hidden = response_hidden(policy, ids, attention, batch.tokens.shape[1])
        values = None if critic is None else critic(hidden, ids, attention)[batch.mask]
    return PolicyPass(hidden[batch.mask], values)


@torch.no_grad()
def token_statistics(
    policy: nn.Module,
    ref_model: nn.Module | None,
    responses: Responses,
    *,
    critic: Critic | None = None,
    temperature: float = 1.0,
    batch_size: int = 256,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    gemm_dtype: torch.dtype | None = None,
    first_pass: PolicyPass | None = None,
) -> TokenRecord:
    """Log-probabilities, exact KL, entropy and values at every response token.

    One pass of each trunk; the vocabulary is only ever seen in chunks.

    Args:
        policy: the policy π.
        ref_model: the reference q; None means the policy with its PEFT adapter off.
        responses: what π sampled at `temperature`.
        critic: reads values off the policy's trunk, or off its own.
        temperature: the distributions are those of logits / temperature.
        batch_size: responses per pass; the same as in training keeps π_old bitwise equal to π.
        autocast: makes the context in which the trunks run: their precision.
        gemm_dtype: precision of the factors of the heads' products; see `fused_token_stats`.
        first_pass: the policy's pass over the first `batch_size` responses, where it was made
            already (to be differentiated later).
    """
    head = output_head(policy)
    parts, hidden_parts, value_parts = [], [], []
    for number, rows in enumerate(torch.arange(len(responses)).split(batch_size)):
        batch = responses.rows(rows)
        if number > 0 or first_pass is None:
            hidden, values = policy_pass(policy, critic, batch, autocast)
        else:
            hidden, values = first_pass
        with autocast(), reference_model(policy, ref_model) as ref:
            ref_hidden = response_hidden(
                ref, batch.input_ids, batch.attention_mask, batch.tokens.shape[1]
            )[batch.mask]
            ref_head = output_head(ref)
        if values is not None:
            value_parts.append(values)
        hidden_parts.append(ref_hidden)
        parts.append(
            fused_token_stats(
                hidden,
                head,
                ref_hidden,
                ref_head,
                batch.tokens[batch.mask],
                temperature=temperature,
                whole_rows=True,
                gemm_dtype=gemm_dtype,
            )
        )

    def restore(values: Sequence[Tensor]) -> Tensor:
        return scatter_tokens(torch.cat(list(values)), responses.mask)

    policy_logp, ref_logp, kl, entropy = (restore(values) for values in zip(*parts, strict=True))
    return TokenRecord(
        policy_logp=policy_logp,
        ref_logp=ref_logp,
        kl=kl,
        entropy=entropy,
        ref_hidden=restore(hidden_parts),
        values=restore(value_parts) if value_parts else None,
    )


def collect_rollout(
    responses: Responses,
    reward: AnyReward,
    tokens: TokenRecord,
    judges: Mapping[str, AnyReward] | None = None,
) -> Rollout:
    """Joins responses, their scores by `reward` and by the `judges`, and their token statistics."""
    return Rollout(
        responses=responses,
        scores=score_responses(reward, responses),
        tokens=tokens,
        other_scores={
            name: score_responses(judge, responses, f"the judge {name!r}")
            for name, judge in (judges or {}).items()
        },
    )
