"""GRPO whose KL penalty is the exact token KL, with the true gradient of the sequence KL."""

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from rlkl.trainers.trl.exact_kl import ExactTokenKL


class RaoBlackwellGRPOTrainer(ExactTokenKL, GRPOTrainer):
    """TRL's GRPO with D_t = D_KL(π(·|h_t) ‖ q(·|h_t)) in place of k3 in the loss.

    The gradient of k3 is that of the *forward* token KL, and no token is charged for the KL that it
    leads to. Here token t has the advantage

        A_t = A − β (Σ_{s>t} D_s − b_t),

    A the group's of the scores as TRL makes it (divided by their spread unless scale_rewards says
    otherwise: β is then in units of that), D_s as the rollout measured it, b_t the mean over the
    other responses to the prompt that reach t; and the loss of token t has + β D_t(θ). At the first
    update of a rollout the KL's part has the expected gradient β ∇D_KL(π ‖ q) of whole responses,
    divided by TRL's count of tokens: a constant for ``loss_type="dr_grpo"``, else the batch's own
    tokens, which makes it so up to O(1 / responses). Logs are those of
    :class:`RaoBlackwellRLOOTrainer`, as are the arguments; ``use_bias_correction_kl`` is of TRL's
    k3 and has no effect.

    References: DeepSeekMath (Shao et al., 2024), https://arxiv.org/abs/2402.03300; Better
    Estimation of the KL Divergence Between Language Models (Amini, Vieira and Cotterell, 2025),
    https://arxiv.org/abs/2504.10637.

    Raises:
        ValueError: as :class:`RaoBlackwellRLOOTrainer`; also for settings that drop or reweigh
            tokens (``loss_type``, ``importance_sampling_level``, ``top_entropy_quantile``).
    """

    args: GRPOConfig
    max_completion_length: int

    def with_kl(self, batch: dict[str, Any], kl_cost: Tensor) -> dict[str, Any]:
        """A rollout's batch, with advantages [B, T] less the KL [B, T] that follows each token."""
        return batch | {"advantages": batch["advantages"][:, None] - self.kl_coef * kl_cost}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of score and future KL, and β times the KL at each token."""
        self._joint = stats = self.differentiable(inputs)
        loss = super()._compute_loss(model, inputs)
        return loss + self.kl_coef * self.mean_over_tokens(stats.kl, inputs)

    def mean_over_tokens(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Σ x over the tokens' number, as TRL divides its own loss for ``args.loss_type``."""
        mask, training = inputs["completion_mask"].bool(), self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1.0
        total = torch.where(mask, x, 0.0).sum()
        if self.args.loss_type == "dr_grpo":
            return total / (len(mask) * self.max_completion_length) / accumulated
        if self.args.loss_type == "bnpo":
            return total / mask.sum().clamp(min=1) / accumulated
        count = inputs["num_items_in_batch"].clamp(min=1)  # dapo: of the generation batch
        count = count / self.args.world_size  # and of all processes, whose mean is taken
        if training:
            count = count * accumulated / self.args.steps_per_generation
        return total / count
