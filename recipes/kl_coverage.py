"""Do the 95% intervals of `rlkl kl` cover? Every estimator on the same responses, many times over.

    python recipes/kl_coverage.py --policy runs/sentiment_ppo/policy

Each repetition draws its own prompts and responses and asks whether each estimator's interval holds
the KL, which a large run of the exact estimator on all the prompts tells. Prints a table; keeps one
record per repetition in repetitions.jsonl and goes on from there when the same command is given
again.
"""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging

from rlkl.cli import SettingsParser, fail, refusing_bad_input
from rlkl.data import EMBEDDED_TRAIN_PROMPTS, load_prompts
from rlkl.evaluation.kl_estimate import (
    Estimand,
    KLEstimation,
    KLReport,
    SampledResponses,
    Settings,
)
from rlkl.models import ModelPair, load_pair


@dataclass
class CoverageArguments:
    """What is compared, and how often."""

    policy: str = field(metadata={"help": "The model that has moved: hub id, folder, adapter."})
    ref: str = field(default="embedded", metadata={"help": "The model it started from."})
    prompts: str | None = field(
        default=None, metadata={"help": "The population of prompts; None: the embedded ones."}
    )
    repetitions: int = field(default=20, metadata={"help": "Independent estimates."})
    num_samples: int = field(default=128, metadata={"help": "Responses in each, one per prompt."})
    truth_samples: int = field(
        default=4096, metadata={"help": "Responses behind the value that is taken as true."}
    )
    max_new_tokens: int = field(default=24, metadata={"help": "Length limit of a response."})
    seed: int = field(default=0, metadata={"help": "Of prompts and draws."})
    output_dir: str = field(default="runs/kl_coverage", metadata={"help": "For the records."})


def main() -> None:
    console = Console()
    with refusing_bad_input():
        (args,) = SettingsParser(
            (CoverageArguments,),
            description=__doc__,
        ).parse()
        if args.repetitions < 2:
            fail(f"--repetitions {args.repetitions}: a coverage needs at least 2")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        prompts = list(load_prompts(args.prompts or EMBEDDED_TRAIN_PROMPTS)["prompt"])
        pair = load_pair(args.policy, args.ref)
        folder = Path(args.output_dir)
        records = earlier_records(folder, args)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("truth", total=args.truth_samples)

        def run(label: str, some: list[str], seed: int, count: int, estimand: str) -> KLReport:
            progress.reset(bar, description=label, total=count)
            return estimate(
                pair, some, args, seed, count, estimand, lambda n: progress.update(bar, completed=n)
            )

        if not records:
            truth = run("truth", prompts, args.seed, args.truth_samples, "given_prompts")
            keep(folder, records, {"truth": truth.best.nats_per_response, "se": truth.best.stderr})
        while len(records) <= args.repetitions:
            seed = args.seed + len(records)
            drawn = torch.randint(
                len(prompts), (args.num_samples,), generator=torch.Generator().manual_seed(seed)
            )
            some = [prompts[i] for i in drawn.tolist()]
            label = f"repetition {len(records)} of {args.repetitions}"
            report = run(label, some, seed, args.num_samples, "population")
            keep(folder, records, report.to_dict()["estimators"])
    summary = summarise(records[0], records[1 : args.repetitions + 1])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_table(console, summary, args)


def estimate(
    pair: ModelPair,
    prompts: list[str],
    args: CoverageArguments,
    seed: int,
    count: int,
    estimand: str,
    progress: Any,
) -> KLReport:
    """One estimate of `count` responses."""
    source = SampledResponses(
        pair,
        prompts,
        limit=count,
        max_new_tokens=args.max_new_tokens,
        temperature=1.0,
        seed=1 + 1_000_003 * seed,
        batch_size=128,
    )
    run = KLEstimation(pair, source, Settings(estimand=Estimand(estimand)))
    while not run.done:
        run.step()
        progress(run.n)
    return run.report()


def earlier_records(folder: Path, args: CoverageArguments) -> list[dict[str, Any]]:
    """What an earlier run with the same settings has left.

    Raises:
        ValueError: the folder holds records of other settings.
    """
    settings = {k: v for k, v in asdict(args).items() if k not in ("output_dir", "repetitions")}
    file = folder / "settings.json"
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise ValueError(f"{folder} holds records of other settings: choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")
    records = folder / "repetitions.jsonl"
    lines = records.read_text().splitlines(keepends=True) if records.is_file() else []
    if lines and not lines[-1].endswith("\n"):  # a kill has cut it
        records.write_text("".join(lines[:-1]))
        del lines[-1]
    return [json.loads(line) for line in lines]


def keep(folder: Path, records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Appends a record, in memory and on disk."""
    records.append(record)
    with (folder / "repetitions.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def summarise(truth: dict[str, float], repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, errors and coverage of each estimator over the repetitions."""
    of_k1 = statistics.median(record["k1"]["stderr"] for record in repetitions)
    rows = {}
    for name, first in repetitions[0].items():
        means = [record[name]["nats_per_response"] for record in repetitions]
        errors = [record[name]["stderr"] for record in repetitions]
        intervals = [record[name]["ci95"] for record in repetitions]
        rows[name] = {
            "unbiased": first["unbiased"],
            "mean": statistics.fmean(means),
            "mean_se": statistics.stdev(means) / len(means) ** 0.5,
            "stderr": statistics.median(errors),
            "spread": statistics.stdev(means),
            "stderr_over_k1": statistics.median(errors) / of_k1,
            "covered": sum(low <= truth["truth"] <= high for low, high in intervals),
        }
    unbiased = [row for row in rows.values() if row["unbiased"]]
    covered = sum(row["covered"] for row in unbiased)
    return {
        "truth": truth["truth"],
        "truth_se": truth["se"],
        "repetitions": len(repetitions),
        "estimators": rows,
        "coverage_of_unbiased": covered / (len(unbiased) * len(repetitions)),
    }


def print_table(console: Console, summary: dict[str, Any], args: CoverageArguments) -> None:
    """The table, and how to read it."""
    n = summary["repetitions"]
    table = Table(title=f"{n} estimates from {args.num_samples} responses each", box=None)
    table.add_column("estimator")
    for column in ("mean", "stderr", "÷ k1", "spread of means", "covered"):
        table.add_column(column, justify="right")
    for name, row in summary["estimators"].items():
        table.add_row(
            name if row["unbiased"] else f"{name} *",
            f"{row['mean']:.3f} ± {1.96 * row['mean_se']:.3f}",
            f"{row['stderr']:.3f}",
            f"{row['stderr_over_k1']:.2f}",
            f"{row['spread']:.3f}",
            f"{row['covered']} of {n}",
        )
    console.print(table, highlight=False)
    console.print(
        f"True value {summary['truth']:.3f} ± {1.96 * summary['truth_se']:.3f} nats per response "
        f"({args.truth_samples} responses, exact per token); the 95% intervals of the unbiased "
        f"estimators hold it in {summary['coverage_of_unbiased']:.1%} of the cases. * biased. "
        "“stderr” is what an estimate says of itself, “spread” how estimates really vary: they "
        "should agree.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
