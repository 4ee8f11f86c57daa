"""Reward and KL over the steps of a run, with the yardsticks, as a PNG."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlkl.cli.sentiment.results import best_of_n_key


def plot_training(
    steps: list[dict[str, float]], summary: dict[str, Any], title: str, step: str, path: Path
) -> None:
    """Draws the records of a run's steps; `step` says what one of them is."""
    x = [record["step"] for record in steps]
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)

    def band(axis: Axes, key: str, label: str, color: str) -> None:
        mean = torch.tensor([record[key] for record in steps])
        error = 1.96 * torch.tensor([record[f"{key}_se"] for record in steps])
        if len(x) == 1:  # neither a line nor a band is seen
            axis.errorbar(x, mean, error, color=color, label=label, marker="o")
            return
        axis.plot(x, mean, color=color, label=label)
        axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)

    best = best_of_n_key(summary)
    band(top, "objective/scores", "reward", "tab:blue")
    band(top, "judge/held_out", "judge (never trained on)", "tab:orange")
    top.axhline(summary[best], color="0.4", linestyle="--", linewidth=1)
    top.text(x[0], summary[best], f" {best.replace('_', '-')}", va="bottom", color="0.4")
    top.axhline(summary["reference_reward"], color="0.7", linestyle=":", linewidth=1)
    top.text(x[-1], summary["reference_reward"], "reference ", va="bottom", ha="right", color="0.5")
    top.set_ylabel("log-odds of positive")
    top.set_title(f"{title}, seed {summary['seed']}")
    top.legend(loc="lower right", frameon=False)
    band(bottom, "kl/k1", "k1 (sampled)", "tab:red")
    band(bottom, "kl/rb", "rb (exact per token)", "tab:green")
    bottom.set_ylabel("KL from the reference,\nnats per response")
    bottom.set_xlabel(f"step ({step})")
    bottom.legend(loc="upper left", frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
