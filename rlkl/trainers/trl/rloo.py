"""RLOO whose KL penalty is the exact token KL, with the true gradient of the sequence KL."""

from typing import Any

from torch import Tensor, nn
from trl import RLOOTrainer

from rlkl.rl import clipped_policy_loss
from rlkl.rollout import TokenRecord
from rlkl.trainers.trl.exact_kl import ExactTokenKL


class RaoBlackwellRLOOTrainer(ExactTokenKL, RLOOTrainer):
    """TRL's RLOO with D_t = D_KL(π(·|h_t) ‖ q(·|h_t)) in place of the sampled log-ratio.

    TRL takes β Σ_t u_t off a response's reward, u_t the sampled log-ratio, and weighs all tokens
    by the response's advantage. Here the advantage is that of the score alone, and the loss has β
    times (mean over responses)

        Σ_t D_t(θ) + Σ_t ρ_t (Σ_{s>t} D_s − b_t),    ρ_t = π(y_t|h_t) / π_old(y_t|h_t),

    D_s as the rollout measured it, b_t the mean over the other responses to the prompt that reach
    t, and ρ_t clipped as in PPO at 1 ± epsilon. At the first update of a rollout its expected
    gradient is β ∇D_KL(π ‖ q) of whole responses. Every rollout's log has k1, k3 and the exact KL
    with standard errors, under PPO's names (`rlkl.trainers.VOCABULARY`); TRL's ``kl`` is the exact
    KL in nats per token.

    References: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human
    Feedback in LLMs (Ahmadian et al., 2024), https://arxiv.org/abs/2402.14740; Better Estimation of
    the KL Divergence Between Language Models (Amini, Vieira and Cotterell, 2025),
    https://arxiv.org/abs/2504.10637, whose code has Σ_s D_s of the whole response as the weight of
    each token: the same expectation, with more variance.

    Args:
        model: the policy, a causal LM, its name, or one with a PEFT adapter. No dropout.
        reward_funcs: reward models (see `reward_models`), or what TRL takes, or several.
        args: TRL's settings; ``beta`` is the KL coefficient, and 0 measures the KL all the same.
        train_dataset: prompts, in a column ``prompt``.
        eval_dataset: prompts for `evaluate`, or several sets of them by name.
        processing_class: the policy's tokenizer.
        reward_processing_classes: TRL's, for reward functions that are classifiers of one label.
        callbacks: further transformers callbacks.
        optimizers: TRL's.
        quantization_config: TRL's, where model is a name.
        peft_config: puts this adapter on the policy.
        ref_model: the reference; None takes the policy as it is now: a frozen copy, the adapter
            off, or a copy of an adapter that the policy came with.
        judges: reward models that are reported and never trained on, by name; prompts are texts.

    Raises:
        ValueError: settings under which the gradient would be another one (a truncated sampler, a
            moving reference, normalised advantages), several processes, and models that cannot be
            measured exactly (see `check_causal_lm`).
    """

    epsilon_low: float

    def with_kl(self, batch: dict[str, Any], tokens: TokenRecord) -> dict[str, Any]:
        """A rollout's batch, with the reference's states, and the KL that follows each token."""
        mask = batch["completion_mask"].bool()
        return batch | {
            "old_token_logps": tokens.policy_logp,
            "ref_hidden": tokens.ref_hidden,
            "kl_cost": self.future_cost(tokens, mask),
        }

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's clipped loss of the score, and β times the KL's."""
        self._joint = stats = self.differentiable(inputs)
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        logp, old_logp, cost = (
            x[mask] for x in (stats.policy_logp, inputs["old_token_logps"], inputs["kl_cost"])
        )
        future = clipped_policy_loss(logp, old_logp, -cost, self.epsilon_low)
        return loss + self.kl_coef * (stats.kl[mask] + future).sum() / len(mask)
