"""The vocabulary of logged metrics, the file they go to, and how steps are averaged."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

VOCABULARY: dict[str, str] = {
    "kl/k1": "mean_b Σ_t u_t; u = log π(y_t|h_t) − log q(y_t|h_t). Nats per response",
    "kl/k3": "mean_b Σ_t (exp(−u_t) − 1 + u_t). Nats per response",
    "kl/rb": "mean_b Σ_t D_t; D_t = D_KL(π(·|h_t) ‖ q(·|h_t)), exact. Nats per response",
    "kl/k1_per_token": "Σ_bt u_t / Σ_b T_b. Nats per token",
    "kl/k3_per_token": "Σ_bt (exp(−u_t) − 1 + u_t) / Σ_b T_b. Nats per token",
    "kl/rb_per_token": "Σ_bt D_t / Σ_b T_b. Nats per token",
    "objective/kl": "mean_b Σ_t k_t, k the estimator that is penalised. Nats per response",
    "objective/entropy": (
        "mean_b −log π(y_b) of whole responses, whose expectation is the entropy of the policy's "
        "responses. Nats per response"
    ),
    "objective/scores": "mean_b score_b, the reward model's score before any penalty",
    "objective/scores_std": "standard deviation of score_b over the batch",
    "objective/non_score_reward": "mean_b −β Σ_t c_t: the KL part of the reward",
    "objective/rlhf_reward": "mean_b Σ_t r_t: score (after the missing-EOS penalty) and KL part",
    "judge/*": "mean_b of a judge's score of the same responses; never trained on",
    "policy/entropy_per_token": "Σ_bt H(π(·|h_t)) / Σ_b T_b. Nats per token",
    "response/length": "mean_b T_b: response tokens, an end-of-text token included",
    "response/truncated_fraction": "share of responses cut at response_length before they ended",
    "val/num_eos_tokens": "responses of the step that ended by themselves: its end-of-text tokens",
    "kl_coef": "β of this step; adaptive β moves after the step's KL was measured",
    "val/ratio": "mean of π(y_t)/π_old(y_t) over the tokens of all updates of the step",
    "val/ratio_var": "variance of π(y_t)/π_old(y_t) over the same tokens",
    "val/ess_fraction": (
        "(Σw)² / (B Σw²), w = π(y)/π_old(y) of whole responses; of the step's last update"
    ),
    "val/truncated_fraction": (
        "share of the tokens of the step's updates with Π_{s<t} π(y_s)/π_old(y_s) > kl_weight_bound"
    ),
    "val/first_ratio_error": "max |π(y_t)/π_old(y_t) − 1| at the step's first update; must be 0",
    "policy/approxkl_avg": (
        "mean of (ρ − 1) − log ρ, ρ = π/π_old: k3 of D_KL(π_old ‖ π). Nats per token"
    ),
    "policy/clipfrac_avg": "share of tokens with ρ outside 1 ± cliprange",
    "val/clipfrac_avg": "share of tokens with |V − V_old| > cliprange_value",
    "val/explained_variance": "1 − Var(R_t − V_t) / Var(R_t), before the step's updates",
    "val/advantage_std": "σ by which advantages, and the loss-side β, are divided",
    "loss/policy_avg": "clipped policy loss, mean over tokens",
    "loss/value_avg": "clipped value loss, mean over tokens, before vf_coef",
    "loss/kl_avg": (
        "β/σ · mean over tokens of the differentiated k_t, from a rollout's second update on times "
        "its weight W_t if kl_off_policy asks for one; 0 when it is in the reward only"
    ),
    "time/generation": "seconds: sampling the responses",
    "time/scoring": "seconds: reward model and judges",
    "time/statistics": (
        "seconds: policy, reference and critic on the responses; the first update takes its policy "
        "pass from here"
    ),
    "time/optimisation": "seconds: the step's updates, but for the last optimiser step",
    "time/step": "seconds: the whole step",
    "episode": "responses sampled so far",
    "eps": "responses of the step by its seconds (time/step); of all processes",
    "loss": "total loss of the step's last update",
    "grad_norm": "gradient norm of the step's last update, before clipping",
    "learning_rate": "of the step's last update",
    "epoch": "passes over the prompts so far",
}
"""Every metric by its formula. A key ending in ``_se`` is the standard error of the mean before it
(clustered by prompt); b runs over responses, t over their real tokens, π is the policy that
sampled, q the reference, h_t the prefix before y_t.

Names are those of TRL's PPO (which TRL had up to 1.12) where it has one, but for two: its ``lr`` is
``learning_rate``, and its ``policy/entropy_avg``, a mean over padded positions, is
``policy/entropy_per_token``. Three mean a little else: its ``objective/entropy`` loses 1 for every
pad token, its ``policy/approxkl_avg`` is k2, mean (log ρ)² / 2, and its ``eps`` is the mean since
training began."""


def described(name: str) -> str | None:
    """What the vocabulary says of a metric, standard errors, judges and ``eval_`` keys included.

    >>> described("kl/rb_se")[:14]
    'standard error'
    """
    name = re.sub("^eval_(.*_(?=[a-z]+/))?", "", name)  # the name of an evaluation set too
    if name.endswith("_se"):
        mean = described(name.removesuffix("_se"))
        return mean and f"standard error of: {mean}"
    if name.startswith("judge/"):
        return VOCABULARY["judge/*"]
    return VOCABULARY.get(name)


def average_steps(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over logged steps; standard errors add in squares: se = √(Σ se²) / n.

    >>> average_steps([{"x": 1.0, "x_se": 3.0}, {"x": 3.0, "x_se": 4.0}])
    {'x': 2.0, 'x_se': 2.5}
    """
    merged = {}
    for key in steps[0]:
        values = [step[key] for step in steps]
        if key.endswith("_se"):
            merged[key] = math.sqrt(sum(value**2 for value in values)) / len(values)
        elif key == "episode":
            merged[key] = values[-1]
        else:
            merged[key] = sum(values) / len(values)
    return merged


def _json_number(value: Any) -> Any:
    """None for nan and inf, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _goes_before(record: dict[str, Any], step: int) -> bool:
    """Whether a run that goes on after `step` has the record too: not that of a training's end."""
    return record["step"] <= step and "train_runtime" not in record


class MetricsFile(TrainerCallback):
    """Appends every log to ``metrics.jsonl`` in the output folder, whatever else is reported to.

    A run that resumes first drops the records after its checkpoint, and that of the stop, so that
    each step stands once; a new run drops those of the run before it.
    """

    def __init__(self) -> None:
        self.written: set[str] = set()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keeps the records of the steps that training goes on from."""
        if not state.is_world_process_zero:
            return
        for name in ("metrics", "completions"):
            path = self._path(args).with_name(f"{name}.jsonl")
            if path.is_file():
                lines = path.read_text().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]  # the last may be cut
                own = [line for line in whole if state.global_step > 0 or line in self.written]
                kept = [line for line in own if _goes_before(json.loads(line), state.global_step)]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                os.replace(temporary, path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one record."""
        if logs and state.is_world_process_zero:
            with self._path(args).open("a") as file:
                record = {"step": state.global_step, **logs}
                line = json.dumps({k: _json_number(v) for k, v in record.items()}) + "\n"
                file.write(line)
                self.written.add(line)

    @staticmethod
    def _path(args: TrainingArguments) -> Path:
        return Path(str(args.output_dir)) / "metrics.jsonl"


class NoLogOfPartEpochs(TrainerCallback):
    """Where a stop cuts an epoch short, ``logging_strategy`` and ``eval_strategy`` "epoch" wait.

    The Trainer takes any end of its loop for an epoch's; the run that goes on logs and evaluates
    once the epoch is whole.
    """

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Takes back what the Trainer has just decided."""
        if control.should_training_stop and state.global_step < state.max_steps:
            whole = float(state.epoch or 0).is_integer()
            if not whole and args.logging_strategy == IntervalStrategy.EPOCH:
                control.should_log = False
            if not whole and args.eval_strategy == IntervalStrategy.EPOCH:
                control.should_evaluate = False
