"""Forward and reverse KL on toy distributions: both arrive, by different ways.

    python recipes/akl_toy.py                       # a table, runs/akl_toy/{table.json, *.png}
    python recipes/akl_toy.py --learning_rate 1.0 --output_dir runs/slower

A table of logits is fitted by gradient descent to two targets, from the uniform distribution: a
mixture of two Gaussians, and Zipf's law (a long tail). The errors are Σ|q - π| over the target's
head (the most likely tokens within half of the mass) and over its tail. "Early" is while every fit
still has more than half of its first error. Seconds on a CPU.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlkl.cli import fail
from rlkl.kl import adaptive_kl, forward_kl, reverse_kl
from rlkl.kl.fitting import Fit, fit_policy, gaussian_mixture, long_tail

TARGETS = {"two Gaussians": gaussian_mixture, "long tail": long_tail}
LOSSES = {"FKL": forward_kl, "RKL": reverse_kl, "AKL": adaptive_kl}
STEPS, LEARNING_RATE = 1000, 2.0
COLORS = {"FKL": "tab:blue", "RKL": "tab:red", "AKL": "tab:green"}


@dataclass(frozen=True)
class Experiment:
    """The fits of every loss to one target, from the same start."""

    name: str
    target: Tensor
    fits: dict[str, Fit]

    @property
    def early(self) -> int:
        """The last step at which FKL and RKL both have more than half of their first error."""
        total = torch.stack([f.head_error + f.tail_error for f in self.pair]).amin(0)
        return int((total > total[0] / 2).nonzero().max())

    @property
    def pair(self) -> tuple[Fit, Fit]:
        return self.fits["FKL"], self.fits["RKL"]

    def leads(self) -> dict[str, list[int]]:
        """First and last step from 1 on at which FKL leads on the head, RKL on the tail; the first
        such stretch."""
        forward, reverse = self.pair
        return {
            "FKL on the head": _stretch(forward.head_error < reverse.head_error),
            "RKL on the tail": _stretch(reverse.tail_error < forward.tail_error),
        }


def run(steps: int, learning_rate: float) -> list[Experiment]:
    """Every loss on every target, in float64."""
    torch.set_default_dtype(torch.float64)
    experiments = []
    for name, make in TARGETS.items():
        target = make()
        fits = {loss: fit_policy(target, f, steps, learning_rate) for loss, f in LOSSES.items()}
        experiments.append(Experiment(name, target.exp(), fits))
    torch.set_default_dtype(torch.float32)
    return experiments


def _stretch(leads: Tensor) -> list[int]:
    """First and last step of the first run of True after step 0; empty if there is none."""
    steps = leads[1:].nonzero()[:, 0] + 1
    if len(steps) == 0:
        return []
    first = int(steps[0])
    after = (~leads[first:]).nonzero()[:, 0]
    return [first, first + int(after[0]) - 1 if len(after) else len(leads) - 1]


def rows(experiment: Experiment) -> list[dict[str, float | str]]:
    """The errors at some steps, as they stand in the table."""
    last = len(experiment.pair[0].head_error) - 1
    chosen = sorted({0, 3, 10, experiment.early, 30, 100, 300, 1000, last} & set(range(last + 1)))
    table = []
    for step in chosen:
        row: dict[str, float | str] = {"target": experiment.name, "step": step}
        for loss, fit in experiment.fits.items():
            row[f"{loss} head"] = float(fit.head_error[step])
            row[f"{loss} tail"] = float(fit.tail_error[step])
        table.append(row)
    return table


def draw_errors(experiments: list[Experiment]) -> Figure:
    """Error of head and tail against steps, one row a target."""
    figure, axes = plt.subplots(
        len(experiments),
        2,
        figsize=(9, 3.2 * len(experiments)),
        layout="constrained",
        squeeze=False,
    )
    for line, experiment in zip(axes, experiments, strict=True):
        for axis, part in zip(line, ("head", "tail"), strict=True):
            for loss, fit in experiment.fits.items():
                error = fit.head_error if part == "head" else fit.tail_error
                axis.plot(error.clamp(min=1e-6), color=COLORS[loss], label=loss)
            axis.axvspan(1, experiment.early, color="0.92", linewidth=0, zorder=0)
            axis.set(xscale="symlog", yscale="log", title=f"{experiment.name}: {part}")
            axis.set(xlabel="step (grey: early)", ylabel="Σ |q − π|", xlim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    return figure


def draw_policies(experiment: Experiment) -> Figure:
    """The target and the policies of FKL and RKL, early, later and at the end."""
    last = len(experiment.pair[0].policies) - 1
    chosen = [max(1, experiment.early // 2), 2 * experiment.early, last]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained", sharey=True)
    for axis, step in zip(axes, chosen, strict=True):
        axis.fill_between(range(len(experiment.target)), experiment.target, color="0.85")
        for loss in ("FKL", "RKL"):
            policy = experiment.fits[loss].policies[step]
            axis.plot(policy, color=COLORS[loss], label=loss)
        axis.set(title=f"step {step}", xlabel="token")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"probability ({experiment.name})")
    axes[0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of gradient descent")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE, help="on the logits")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/akl_toy"))
    args = parser.parse_args()
    matplotlib.use("Agg")
    if args.steps < 10 or not args.learning_rate > 0:
        fail("--steps must be at least 10 and --learning_rate positive")
    experiments = run(args.steps, args.learning_rate)
    console, table = Console(), []
    for experiment in experiments:
        table += (lines := rows(experiment))
        shown = Table(title=f"{experiment.name}: error of head and tail, from the uniform start")
        for column in list(lines[0])[1:]:
            shown.add_column(column, justify="right")
        for line in lines:
            values = list(line.values())[1:]
            shown.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values))
        console.print(shown)
        leads = experiment.leads()
        for claim, stretch in leads.items():
            when = "never" if not stretch else f"from step {stretch[0]} to {stretch[1]}"
            console.print(f"{claim}: leads {when} (early: to step {experiment.early})")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = {
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "rows": table,
        "early": {e.name: e.early for e in experiments},
        "leads": {e.name: e.leads() for e in experiments},
    }
    (args.output_dir / "table.json").write_text(json.dumps(record, indent=2) + "\n")
    draw_errors(experiments).savefig(args.output_dir / "errors.png", dpi=130)
    for experiment in experiments:
        name = f"{experiment.name.replace(' ', '_')}.png"
        draw_policies(experiment).savefig(args.output_dir / name, dpi=130)
    plt.close("all")
    console.print(f"Written to {args.output_dir}: table.json, errors.png, one PNG a target")


if __name__ == "__main__":
    main()
