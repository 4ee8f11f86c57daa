"""What `rlkl kl` shows in the terminal."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from rlkl.evaluation.kl_estimate import KLEstimation, KLReport


@contextmanager
def progress_bar(estimation: "KLEstimation") -> Iterator[Callable[[bool], None]]:
    """A bar of the responses done, with the estimate so far; gives what to call after a batch."""
    settings = estimation.settings
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[so_far]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = progress.add_task("responses", total=estimation.source.limit, so_far="")

    def show(stopping: bool) -> None:
        so_far = estimation.accumulator.interval(settings.headline)
        text = f"{settings.headline} {so_far.mean:.4g} ± {so_far.half_width:.2g} nats"
        if settings.target_stderr is not None:
            text += f" (stderr {so_far.stderr:.2g}, wanted {settings.target_stderr:g})"
        if stopping:
            text += ", stopping"
        progress.update(task, completed=estimation.n, so_far=text)

    with progress:
        yield show


def print_report(console: Console, report: "KLReport") -> None:
    """The answer in a sentence, the table of estimators, the tokens, and what to know."""
    best, low, high = report.best, *report.best.ci95
    console.print(
        f"\nD_KL({escape(report.policy)} ‖ {escape(report.ref)}) = "
        f"[bold]{best.nats_per_response:.4g}[/bold] nats per response, 95% interval "
        f"{low:.4g} to {high:.4g} (by {report.headline})",
        highlight=False,
    )
    table = _estimators(report, explained=True)
    if _width(table, console) > console.width:
        table = _estimators(report, explained=False)
    table.width = _width(table, console)  # in a narrow terminal too: a number cut short is another
    console.print(table, highlight=False, crop=False)
    console.print("[dim]* biased: shown for comparison[/dim]")
    console.print(
        f"{report.n} responses to {report.prompts} prompts, {report.tokens} tokens, "
        f"{report.truncated_fraction:.0%} cut at {report.max_tokens}; temperature "
        f"{report.temperature:g}; effective sample size {report.ess:.0f} for "
        f"the policy, {report.ess_ref:.0f} for the reference; {report.seconds:.1f} s, of which "
        f"{report.sampling_seconds:.1f} s sampling.",
        highlight=False,
    )
    what = {
        "population": f"Intervals are for the mean over the population of prompts: {report.units} "
        "independent units, Student's t.",
        "given_prompts": "Intervals are for the mean over exactly these prompts: they cover the "
        "draw of the responses.",
    }
    console.print(what[str(report.estimand)], highlight=False)
    _print_tokens(console, report)
    if report.interrupted:
        console.print("[yellow]Interrupted: these are the responses there were.[/yellow]")
    for note in report.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}", highlight=False)


def _estimators(report: "KLReport", *, explained: bool) -> Table:
    """A row an estimator, if wanted with what it is."""
    from rlkl.evaluation.kl_estimate.report import KIND

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("estimator", no_wrap=True)
    for name in ("nats", "stderr", "95% interval", "÷ k1", "per token", "< 0"):
        table.add_column(name, justify="right", no_wrap=True)
    if explained:
        table.add_column("", style="dim", no_wrap=True)
    of_k1 = report.estimators["k1"].stderr
    for name, e in report.estimators.items():
        share = "" if e.negative_fraction is None else f"{e.negative_fraction:.0%}"
        relative = f"{e.stderr / of_k1:.2f}" if 0 < of_k1 < math.inf else ""
        label = name if e.unbiased else f"{name} *"
        table.add_row(
            f"[bold]{label}[/bold]" if name == report.headline else label,
            f"{e.nats_per_response:.5g}",
            f"{e.stderr:.2g}",
            f"{e.ci95[0]:.4g} to {e.ci95[1]:.4g}",
            relative,
            f"{e.nats_per_token:.3g}",
            share,
            *([KIND.get(name, "")] if explained else []),
        )
    return table


def _width(table: Table, console: Console) -> int:
    """Columns that a table needs to be shown whole."""
    return Measurement.get(console, console.options.update(max_width=1000), table).maximum


def _print_tokens(console: Console, report: "KLReport") -> None:
    """The ten tokens that the KL comes from most."""
    if not report.top_tokens:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("token")
    for name in ("of the KL", "policy", "reference", ""):
        table.add_column(name, justify="right")
    for token in report.top_tokens[:10]:
        table.add_row(
            escape(repr(token.token)),
            f"{token.share:.1%}",
            f"{token.policy:.3%}",
            f"{token.ref:.3%}",
            "raised" if token.policy > token.ref else "lowered",
        )
    console.print("\nTokens that the KL comes from, with their mean probabilities:")
    console.print(table, highlight=False)
