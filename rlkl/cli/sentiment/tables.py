"""The tables that end a run."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlkl.cli.sentiment.results import best_of_n_key


def print_summary(
    console: Console, summary: dict[str, Any], title: str, response_length: int
) -> None:
    """Held-out reward, judge and KL, before and after, and the yardstick's sentence."""
    table = Table(title=f"Held-out prompts, {title} (± is a 95% interval)")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key, percent in (
        ("reward (log-odds of positive)", "reward", False),
        ("judge (never trained on)", "judge", False),
        ("positive share", "positive", True),
    ):
        table.add_row(
            label,
            _interval(summary[f"{key}_before"], summary[f"{key}_before_se"], percent),
            _interval(summary[f"{key}_after"], summary[f"{key}_se"], percent),
        )
    for name in ("rb", "k1"):
        exact = "exact per token" if name == "rb" else "sampled"
        kl = f"{summary[f'kl_{name}']:.2f} ± {1.96 * summary[f'kl_{name}_se']:.2f}"
        table.add_row(f"KL by {name} ({exact}), nats per response", "0", kl)
    console.print(table)
    best = best_of_n_key(summary)
    ratio = summary["train_se_ratio_k1_over_rb"]
    errors = (
        ""
        if ratio is None
        else (f"Standard error of k1 over rb on the training rollouts: {ratio:.1f}. ")
    )
    console.print(
        f"{best.replace('_', '-')} of the reference scores {summary[best]:+.2f} at up to "
        f"{summary['kl_of_best_of_n_bound']:.2f} nats: {summary['gap_closed']:.0%} of the gap is "
        f"closed. KL at step 0: {summary['initial_kl']:g}. {errors}The KL is that of "
        f"responses of at most {response_length} tokens. {summary['seconds']:.0f} s."
    )


def _interval(mean: float, se: float, percent: bool) -> str:
    if percent:
        return f"{mean:.1%} ± {1.96 * se:.1%}"
    return f"{mean:+.2f} ± {1.96 * se:.2f}"


def print_samples(console: Console, samples: list[dict[str, Any]]) -> None:
    """The responses to the first held-out prompts, before and after, with their rewards."""
    texts = Table(title="The first five held-out prompts", show_lines=True)
    for column in ("prompt", "before", "after"):
        texts.add_column(column, ratio=1 if column == "prompt" else 2)
    for row in samples:
        texts.add_row(  # a text may hold brackets, which are no markup
            escape(row["prompt"]),
            f"{escape(row['before'])} [dim]({row['before_reward']:+.1f})[/dim]",
            f"{escape(row['after'])} [dim]({row['after_reward']:+.1f})[/dim]",
        )
    console.print(texts)
