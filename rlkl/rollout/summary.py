"""What a rollout says about its policy: means with standard errors, in the names of the vocabulary
table.
"""

import torch
from torch import Tensor

from rlkl.kl import (
    RaoBlackwellEstimator,
    SampledEstimator,
    get_estimator,
    mean_and_stderr,
    per_token_mean_and_stderr,
    sequence_kl,
)
from rlkl.rollout.records import Responses, Rollout

REPORTED_ESTIMATORS = ("k1", "k3", "rb")


def token_kl(name: str, rollout: Rollout) -> Tensor:
    """k_t by the estimator `name` from a rollout's statistics: [B, T] nats, 0 where masked.

    Raises:
        ValueError: a rollout's statistics do not hold what the estimator needs (topk).
    """
    estimator = get_estimator(name)
    if isinstance(estimator, SampledEstimator):
        return estimator.from_token_logp(rollout.tokens.policy_logp, rollout.tokens.ref_logp)
    if isinstance(estimator, RaoBlackwellEstimator):
        return rollout.tokens.kl
    raise ValueError(
        f"estimator {name!r} needs whole distributions, of which a rollout keeps the exact KL: "
        "use 'rb', which costs no more"
    )


def prompt_groups(responses: Responses) -> Tensor | None:
    """[B] which prompt each response is to: the `groups` of standard errors clustered by prompt.

    None for a single prompt: an error is then about this one, given which its responses are
    independent.
    """
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(responses.prompts))}
    if len(number) == 1:
        return None
    return torch.tensor([number[p] for p in responses.prompts], device=responses.mask.device)


def summarise(rollout: Rollout) -> dict[str, float]:
    """KL by every estimator on the same responses, score, judges, entropy, length.

    Keys are those of the vocabulary table in `rlkl.trainers.metrics`; one ending in ``_se`` is the
    standard error of the mean before it, clustered by prompt: responses to one prompt are alike.
    """
    mask, groups = rollout.responses.mask, prompt_groups(rollout.responses)
    metrics: dict[str, float] = {}

    def put(name: str, mean: Tensor, stderr: Tensor) -> None:
        metrics[name], metrics[f"{name}_se"] = float(mean), float(stderr)

    for name in REPORTED_ESTIMATORS:
        k = token_kl(name, rollout)
        put(f"kl/{name}", *mean_and_stderr(sequence_kl(k, mask), groups))
        put(f"kl/{name}_per_token", *per_token_mean_and_stderr(k, mask, groups))
    put("objective/scores", *mean_and_stderr(rollout.scores, groups))
    metrics["objective/scores_std"] = float(rollout.scores.std(correction=0))
    for name, scores in rollout.other_scores.items():
        put(f"judge/{name}", *mean_and_stderr(scores, groups))
    entropy = per_token_mean_and_stderr(rollout.tokens.entropy, mask, groups)
    put("policy/entropy_per_token", *entropy)
    surprise = torch.where(mask, -rollout.tokens.policy_logp, 0.0).sum(1)  # [B]
    put("objective/entropy", *mean_and_stderr(surprise, groups))
    put("response/length", *mean_and_stderr(mask.sum(1).float(), groups))
    metrics["val/num_eos_tokens"] = float(rollout.responses.ended.sum())
    metrics["response/truncated_fraction"] = float((~rollout.responses.ended).float().mean())
    return metrics
