"""The ends of finished runs of sentiment_ppo.py, as rows of a Markdown table.

    python recipes/compare_runs.py runs/sentiment_ppo runs/fp32

Reward and KL are means over the last training steps (± is a 95% interval, from the standard errors
of the steps, whose rollouts are independent given the policies); then the share of the gap to
best-of-n that is closed on held-out prompts, with the KL there.
"""

import argparse
import json
import math
import statistics
from pathlib import Path


def row(folder: Path, steps: int) -> str:
    """One run's line: the mean of its last `steps` training steps, and its held-out figures."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = [record for line in lines if "kl/rb" in (record := json.loads(line))][-steps:]
    reward, kl = (statistics.mean(r[name] for r in last) for name in ("objective/scores", "kl/rb"))
    error = math.hypot(*(r["objective/scores_se"] for r in last)) / len(last)
    summary = json.loads((folder / "summary.json").read_text())
    precision = "bf16" if json.loads((folder / "settings.json").read_text())["bf16"] else "float32"
    return (
        f"| {folder.name} | {summary['seed']} | {precision} "
        f"| {reward:.2f} ± {1.96 * error:.2f} at {kl:.2f} nats "
        f"| {summary['gap_closed']:.0%} at {summary['kl_rb']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="output_dir of finished runs")
    parser.add_argument("--steps", type=int, default=10, help="last training steps to average")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; average at least 1")
    for folder in args.runs:
        if not (folder / "summary.json").is_file():
            parser.error(f"{folder} holds no finished run (no summary.json)")
    print("| run | seed | precision | training | held out |\n|---|---|---|---|---|")
    for folder in args.runs:
        print(row(folder, args.steps))


if __name__ == "__main__":
    main()
