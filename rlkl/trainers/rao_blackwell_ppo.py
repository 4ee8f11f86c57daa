"""PPO whose KL penalty is the exact token KL, with the true gradient of the sequence KL."""

from typing import ClassVar

from rlkl.trainers.ppo import PPOTrainer


class RaoBlackwellPPOTrainer(PPOTrainer):
    """PPO with D_t = D_KL(π(·|h_t) ‖ q(·|h_t)) in place of the sampled log-ratio.

        ∇D_KL(π ‖ q) = E[ Σ_t ∇D_t + Σ_t ∇log π(y_t|h_t) Σ_{s>t} D_s ]

    The reward of token t carries −β D_{t+1}, the KL at the prefix that y_t leads to; D_t itself is
    differentiated in the loss. That is all that differs from :class:`PPOTrainer`: which estimate,
    and where it enters.

    Reference: Better Estimation of the KL Divergence Between Language Models (Amini, Vieira and
    Cotterell, 2025), https://arxiv.org/abs/2504.10637. The published code weighs each token by
    the whole response's ΣD; the sum over s > t has the same expectation and less variance.
    """

    default_estimator: ClassVar[str] = "rb"
    default_placement: ClassVar[str] = "both"
