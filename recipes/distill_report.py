"""What distill_reviews.py found: a table, the paired differences of AKL, a plot over steps."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from torch import Tensor

NAMES = {
    "fkl": "FKL",
    "rkl": "RKL",
    "fkl_rkl": "FKL+RKL",
    "akl": "AKL",
    "akl_r": "AKL-r",
    "js": "JS",
    "skew_fkl": "skew FKL",
    "skew_rkl": "skew RKL",
}
COLUMNS = {
    "held_out/divergence/fkl": ("forward KL", "nats per token, teacher's texts"),
    "held_out/divergence/rkl": ("reverse KL", "nats per token, teacher's texts"),
    "own/divergence/rkl": ("reverse KL, own", "nats per token, student's samples"),
    "perplexity": ("perplexity", "of the teacher's texts"),
    "distinct_2": ("distinct-2", "student's samples"),
    "self_bleu": ("self-BLEU", "student's samples"),
}
DIVERGENCE_COLUMNS = [key for key in COLUMNS if "divergence" in key]
RIVALS = ("fkl", "rkl", "fkl_rkl")


def report(output_dir: Path, records: list[dict[str, Any]], console: Console) -> None:
    """The table, the paired differences of AKL, the plot; all of it in summary.json too."""
    losses = list(dict.fromkeys(record["loss"] for record in records))
    seeds = sorted({record["seed"] for record in records})
    by_loss = {loss: {r["seed"]: r for r in records if r["loss"] == loss} for loss in losses}
    spread = "mean ± standard error over seeds" if len(seeds) > 1 else "one seed: no errors"
    table = Table(title=f"Held-out prompts, seeds {', '.join(map(str, seeds))} ({spread})")
    for name in ("loss", *(title for title, _ in COLUMNS.values()), "CPU s"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    summary: dict[str, Any] = {"seeds": seeds, "losses": {}, "akl_minus": {}}
    for loss, runs in by_loss.items():
        cells, values = [], {}
        for key in COLUMNS:
            mean, stderr = mean_and_error([r["metrics"][key] for r in runs.values()])
            values[key], values[f"{key}_se"] = mean, stderr
            cells.append(f"{mean:.3f}" if stderr is None else f"{mean:.3f} ± {stderr:.3f}")
        for key in ("seconds", "cpu_seconds"):
            values[key] = round(sum(r[key] for r in runs.values()) / len(runs), 1)
        summary["losses"][loss] = values
        table.add_row(NAMES[loss], *cells, f"{values['cpu_seconds']:.0f}")
    console.print(table)
    console.print("; ".join(f"{title}: {what}" for title, what in COLUMNS.values()))
    console.print(both_start(records))
    for rival in [r for r in RIVALS if r in by_loss and "akl" in by_loss]:
        line = []
        for key in DIVERGENCE_COLUMNS:
            found = difference(by_loss["akl"], by_loss[rival], key)
            summary["akl_minus"].setdefault(rival, {})[key] = found
            half = "one seed" if found["ci95_seeds"] is None else f"± {found['ci95_seeds']:.4f}"
            line.append(
                f"{COLUMNS[key][0]} {found['mean']:+.4f} ({half}; ± {found['ci95_prompts']:.4f}): "
                f"{found['verdict']}"
            )
        console.print(f"AKL minus {NAMES[rival]}: " + "; ".join(line))
    console.print(
        "In brackets half of two 95% intervals (Student's t, paired): over seeds, and over prompts "
        "for these students. Below 0 AKL is closer to the teacher; a verdict needs both."
    )
    text = json.dumps(summary, indent=2, allow_nan=False)
    (output_dir / "summary.json").write_text(text + "\n")
    plot(output_dir, by_loss)
    console.print(f"Written to {output_dir}: summary.json, held_out.png, runs/*/record.json")


def both_start(records: list[dict[str, Any]]) -> str:
    """Where the students stood before: the same for every loss of a seed."""
    first = {r["seed"]: r["course"][0] for r in records}
    forward, reverse = (
        sum(c[name] for c in first.values()) / len(first) for name in ("fkl", "rkl")
    )
    return (
        f"Before (after the warm-up): forward KL {forward:.3f}, reverse KL {reverse:.3f} nats per "
        "token of the first held-out texts"
    )


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error over seeds; None for a single one, which has no spread."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else None


def difference(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], key: str
) -> dict[str, Any]:
    """Mean over the common seeds of ours − theirs, and half of its two 95% intervals."""
    seeds = sorted(set(ours) & set(theirs))
    differences = [ours[s]["metrics"][key] - theirs[s]["metrics"][key] for s in seeds]
    mean, stderr = mean_and_error(differences)
    over_seeds = None if stderr is None else half_interval(stderr, len(seeds))
    sums = (torch.tensor([runs[s]["per_prompt"][key] for s in seeds]) for runs in (ours, theirs))
    over_prompts = interval_over_prompts(*sums)
    return {
        "mean": mean,
        "ci95_seeds": over_seeds,
        "ci95_prompts": over_prompts,
        "verdict": verdict(mean, over_seeds, over_prompts),
    }


def half_interval(stderr: float, count: int) -> float:
    """Half of the 95% interval of a mean of `count` values."""
    return float(student_t.ppf(0.975, count - 1)) * stderr


def interval_over_prompts(ours: Tensor, theirs: Tensor) -> float:
    """Half of the 95% interval of the difference of two means per token, for other prompts.

    Each is a ratio of sums, S / L, whose deviation due to prompt p is (S_p − R L_p) / ΣL.

    Args:
        ours: [seeds, prompts, 2], sums and numbers of tokens.
        theirs: of the same seeds and prompts.
    """
    parts = []
    for sums in (ours.double(), theirs.double()):
        total = sums.sum(1, keepdim=True)
        ratio = total[..., :1] / total[..., 1:]
        parts.append((sums[..., :1] - ratio * sums[..., 1:]) / total[..., 1:])
    deviation = (parts[0] - parts[1]).mean(0)  # [prompts, 1]
    count = len(deviation)
    stderr = float((deviation.square().sum() * count / (count - 1)).sqrt())
    return half_interval(stderr, count)


def verdict(mean: float, over_seeds: float | None, over_prompts: float) -> str:
    """What the intervals allow to say."""
    if over_seeds is None:
        return "one seed says nothing of others"
    if abs(mean) <= max(over_seeds, over_prompts):
        return "not told apart"
    return "AKL better" if mean < 0 else "AKL worse"


def plot(output_dir: Path, by_loss: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Held-out forward and reverse KL over the steps, a line a loss, bands of a standard error."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name in zip(axes, ("fkl", "rkl"), strict=True):
        for loss, runs in by_loss.items():
            courses = [[c[name] for c in r["course"]] for r in runs.values()]
            steps = [c["step"] for c in next(iter(runs.values()))["course"]]
            values = torch.tensor(courses, dtype=torch.float64)
            (line,) = axis.plot(steps, values.mean(0), label=NAMES[loss])
            if len(courses) > 1:
                error = values.std(0) / len(courses) ** 0.5
                low, high = values.mean(0) - error, values.mean(0) + error
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        direction = "forward" if name == "fkl" else "reverse"
        axis.set(xlabel="step", ylabel=f"held-out {direction} KL, nats per token")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False, ncols=8, loc="outside upper center"
    )
    figure.savefig(output_dir / "held_out.png", dpi=130)
    plt.close(figure)
