"""RLOO whose KL penalty is the exact token KL, with the true gradient of the sequence KL."""

from typing import Any

import torch
from torch import Tensor, nn
from trl import RLOOTrainer

from rlkl.trainers.trl.exact_kl import ExactTokenKL


class RaoBlackwellRLOOTrainer(ExactTokenKL, RLOOTrainer):
    """TRL's RLOO with D_t = D_KL(π(·|h_t) ‖ q(·|h_t)) in place of the sampled log-ratio.

    TRL takes β Σ_t u_t off a response's reward, u_t the sampled log-ratio, and weighs all tokens
    by the response's advantage. Here the advantage is that of the score alone, and the loss has β
    times the mean over responses of

        Σ_t D_t(θ) + ρ Σ_t log π(y_t|h_t) (Σ_{s>t} D_s − b_t),    ρ = π(y) / π_old(y),

    ρ and D_s (as the rollout measured it) constant, b_t the mean over the other responses to the
    prompt that reach t. At the first update of a rollout, where ρ = 1, its expected gradient is
    β ∇D_KL(π ‖ q) of whole responses. In later ones a response whose score is clipped, and pulls no
    more, does not pull to the reference either: the KL alone would undo what the score has moved.

    Every rollout's log has k1, k3 and the exact KL with standard errors, under PPO's names
    (`rlkl.trainers.VOCABULARY`); TRL's ``kl`` is the exact KL in nats per token.

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
            moving reference, normalised advantages), DeepSpeed or FSDP, and models that cannot be
            measured exactly (see `check_causal_lm`).
    """

    epsilon_low: float
    epsilon_high: float

    def with_kl(self, batch: dict[str, Any], kl_cost: Tensor) -> dict[str, Any]:
        """A rollout's batch, with the KL [B, T] that follows each token."""
        return batch | {"kl_cost": kl_cost}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's clipped loss of the score, and β times the KL's."""
        self._joint = stats = self.differentiable(inputs)
        loss = super()._compute_loss(model, inputs)
        ratio = (stats.policy_logp.detach().sum(1) - inputs["old_logps"]).exp()
        future = (inputs["kl_cost"] * stats.policy_logp).sum(1)
        return (
            loss
            + self.kl_coef
            * torch.where(
                self.pulls(ratio, inputs["advantages"]), stats.kl.sum(1) + ratio * future, 0.0
            ).mean()
        )

    def pulls(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """[B] whether the clipped loss of a response's score still has a gradient."""
        above = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        below = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        return ~(above | below)
