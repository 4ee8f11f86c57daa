"""The numbers and texts that a run ends with, and the record of its steps."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from rlkl.evaluation import BestOfN, Evaluation


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """The records of the training steps."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "kl/rb" in (record := json.loads(line))]


def summarise_run(
    before: Evaluation,
    after: Evaluation,
    yardstick: BestOfN,
    seed: int,
    steps: list[dict[str, float]],
) -> dict[str, Any]:
    """The numbers of a run: held-out reward, judge and KL, and the share of the gap to
    best-of-n.
    """
    start, end = before.metrics, after.metrics
    ratios = [step["kl/k1_se"] / step["kl/rb_se"] for step in steps if step["kl/rb_se"] > 0]
    gap = yardstick.reward - yardstick.mean_score
    error = "val/first_ratio_error"  # of the trainers that measure it
    return {
        "reward_before": start["objective/scores"],
        "reward_before_se": start["objective/scores_se"],
        "reward_after": end["objective/scores"],
        "reward_se": end["objective/scores_se"],
        "judge_before": start["judge/held_out"],
        "judge_before_se": start["judge/held_out_se"],
        "judge_after": end["judge/held_out"],
        "judge_se": end["judge/held_out_se"],
        "positive_before": before.positive[0],
        "positive_before_se": before.positive[1],
        "positive_after": after.positive[0],
        "positive_se": after.positive[1],
        f"best_of_{yardstick.n}": yardstick.reward,
        f"best_of_{yardstick.n}_se": yardstick.stderr,
        "reference_reward": yardstick.mean_score,
        "gap_closed": (end["objective/scores"] - yardstick.mean_score) / gap,
        "kl_rb": end["kl/rb"],
        "kl_rb_se": end["kl/rb_se"],
        "kl_k1": end["kl/k1"],
        "kl_k1_se": end["kl/k1_se"],
        "kl_rb_per_token": end["kl/rb_per_token"],
        "kl_of_best_of_n_bound": yardstick.kl_bound,
        "initial_kl": steps[0]["kl/rb"],
        **({"initial_ratio_error": steps[0][error]} if error in steps[0] else {}),
        "train_se_ratio_k1_over_rb": median(ratios) if ratios else None,
        "steps": len(steps),
        "seed": seed,
    }


def best_of_n_key(summary: dict[str, Any]) -> str:
    """The key of the yardstick: ``best_of_<n>``."""
    return next(key for key in summary if key.startswith("best_of_") and not key.endswith("_se"))


def sample_table(before: Evaluation, after: Evaluation, count: int = 5) -> list[dict[str, Any]]:
    """The first held-out prompts with the responses before and after: not picked."""
    rows = []
    for i in range(min(count, len(before.rollout))):
        old, new = before.rollout, after.rollout
        rows.append(
            {
                "prompt": old.responses.prompts[i],
                "before": old.responses.texts[i],
                "before_reward": round(float(old.scores[i]), 2),
                "after": new.responses.texts[i],
                "after_reward": round(float(new.scores[i]), 2),
            }
        )
    return rows
