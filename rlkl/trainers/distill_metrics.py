"""The vocabulary of distillation's metrics, and what its progress bar shows."""

DISTILL_VOCABULARY: dict[str, str] = {
    "divergence/fkl": "mean over tokens of D_KL(p ‖ s). Nats per token",
    "divergence/rkl": "mean over tokens of D_KL(s ‖ p). Nats per token",
    "divergence/fkl_rkl": "mean over tokens of ½ D_KL(p ‖ s) + ½ D_KL(s ‖ p). Nats per token",
    "divergence/js": (
        "mean over tokens of ½ D_KL(p ‖ m) + ½ D_KL(s ‖ m), m = ½ (p + s). Nats per token"
    ),
    "divergence/skew_fkl": "mean over tokens of D_KL(p ‖ αp + (1 − α)s), α = 0.1. Nats per token",
    "divergence/skew_rkl": "mean over tokens of D_KL(s ‖ αs + (1 − α)p), α = 0.1. Nats per token",
    "divergence/akl": "mean over tokens of w D_KL(p ‖ s) + (1 − w) D_KL(s ‖ p). Nats per token",
    "divergence/akl_r": "mean over tokens of (1 − w) D_KL(p ‖ s) + w D_KL(s ‖ p). Nats per token",
    "divergence/fkl_per_response": (
        "mean_b Σ_t D_KL(p ‖ s); on the teacher's samples, the sequence KL of the student from it"
    ),
    "divergence/rkl_per_response": (
        "mean_b Σ_t D_KL(s ‖ p); on the student's samples, the sequence KL D_KL(s ‖ p)"
    ),
    "gap/head": "mean over tokens of Σ_v |p_v − s_v| over the teacher's head (mass head_mass)",
    "gap/tail": "mean over tokens of Σ_v |p_v − s_v| over the rest of the vocabulary",
    "akl/forward_weight": "mean over tokens of w = head / (head + tail), the gaps of each token",
    "student/nll_per_token": "mean over tokens of −log s(y_t|h_t); its exp is the perplexity",
    "teacher/nll_per_token": "mean over tokens of −log p(y_t|h_t)",
    "student/entropy_per_token": "mean over tokens of H(s(·|h_t)). Nats per token",
    "response/length": "mean_b T_b: response tokens, an end-of-text token included",
    "loss/divergence": "mean over tokens of T² D, D the divergence trained on at temperature T",
    "loss/cross_entropy": "mean over tokens of −log s(y_t|h_t) at temperature 1; 0 where unused",
    "data/on_policy": "share of the batches since the last log that the student sampled",
    "data/tokens": "response tokens of a batch, mean over the batches since the last log",
    "time/sampling": "seconds per batch: student's or teacher's responses",
    "time/trunks": "seconds per batch: the passes of both trunks",
    "time/loss": "seconds per batch: divergence and gradient down to the hidden states",
    "time/measure": "seconds per batch: every divergence, on the steps that log",
    "loss": (
        "(1 − c) T² D + c CE, plus the future term of a sequence-level gradient, which eval_loss "
        "does not have"
    ),
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "of the last step",
    "epoch": "passes over the data so far",
}
"""Every metric of distillation by its formula: p is the teacher, s the student, both at
temperature 1 unless said; b runs over responses, t over their real tokens, h_t is the prefix before
y_t; a step has gradient_accumulation_steps batches. A key ending in ``_se`` is the standard error
of the mean before it (responses independent); ``eval_`` is on the evaluation data, ``eval_own/`` on
the student's samples of its prompts."""


def both_directions(logs: dict[str, float]) -> str | None:
    """What the bar shows of a logged step: both KLs per token."""
    if "divergence/fkl" not in logs:
        return None
    forward, reverse = logs["divergence/fkl"], logs["divergence/rkl"]
    return f"forward KL {forward:.3f}   reverse KL {reverse:.3f} nats per token"
