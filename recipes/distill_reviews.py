"""Which divergence teaches a small review LM best? Seven losses at equal steps, over seeds.

    python recipes/distill_reviews.py                    # everything, to runs/distill_reviews
    python recipes/distill_reviews.py --losses akl fkl --seeds 0 --max_steps 20 \
        --output_dir runs/quick
    python recipes/distill_reviews.py --texts my_reviews.jsonl --output_dir runs/mine

The teacher (the embedded review LM) writes a corpus; for each seed a student of a fifth of its size
begins with the teacher's embeddings, projected on as many principal directions as it is wide, and
is warmed up on the corpus by cross-entropy. Every loss starts from that same student and sees the
same batches. Held-out prompts measure both directions: forward KL on the teacher's texts, reverse
KL on the student's own samples, both exact per token. Ends with a table (mean ± standard error over
seeds), the paired differences of AKL with their 95% intervals over seeds and over prompts, and a
plot of held-out KL over steps.

Settings come from the YAML file (default: distill_reviews.yaml beside this script), then from the
command line. What is finished is kept: the same command goes on where it was stopped, and processes
with other --seeds may fill the same --output_dir.
"""

import copy
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from distill_students import StudentArguments, warmed_up
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import t as student_t
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from rlkl.cli import SettingsParser, refusing_bad_input
from rlkl.cli.quiet import quiet_libraries
from rlkl.data import EMBEDDED_EVAL_PROMPTS, EMBEDDED_TRAIN_PROMPTS, load_prompts, load_reviews
from rlkl.evaluation.student import evaluate_student
from rlkl.kl import sequence_kl
from rlkl.models import load_causal_lm, load_tokenizer
from rlkl.rollout import DivergenceRecord, sample_responses
from rlkl.trainers import DistillConfig, DistillTrainer, RichProgress, StopOnInterrupt
from rlkl.trainers.distill_metrics import both_directions
from rlkl.trainers.resume import check_settings
from rlkl.trainers.run_config import RunArguments
from rlkl.trainers.tracking import log_final

HERE = Path(__file__).parent
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


@dataclass
class ReviewsArguments:
    """What is compared, beside DistillConfig (how a run trains)."""

    losses: list[str] = field(
        default_factory=lambda: list(NAMES), metadata={"help": "Divergences to compare."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One student each."})
    teacher: str | None = field(
        default=None, metadata={"help": "Hub id or folder; None: the embedded review LM."}
    )
    texts: str | None = field(
        default=None, metadata={"help": "Reviews to train on (jsonl or hub id); None: teacher's."}
    )
    corpus_size: int = field(default=4096, metadata={"help": "Training texts."})
    num_eval: int = field(default=256, metadata={"help": "Held-out prompts."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; None: torch's choice."}
    )


def main() -> None:
    console = Console()
    with refusing_bad_input():
        parser = SettingsParser(
            (ReviewsArguments, StudentArguments, DistillConfig),
            description=__doc__,
        )
        task, of_student, args = parser.parse(str(HERE / "distill_reviews.yaml"))
        unknown = [loss for loss in task.losses if loss not in NAMES]
        if unknown:
            raise ValueError(f"losses: {unknown[0]!r} is unknown; use some of {', '.join(NAMES)}")
        if not task.seeds or not task.losses:
            raise ValueError("losses and seeds must each name at least one")
        quiet_libraries()
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        tokenizer, teacher = load_tokenizer(task.teacher), load_causal_lm(task.teacher).eval()
        if teacher.config.model_type != "gpt2":
            raise ValueError(
                f"teacher is a {teacher.config.model_type}; the student's shape is known here for "
                "gpt2 alone: use rlkl distill with a student of your own"
            )
        output_dir = Path(str(args.output_dir))
        keep_settings(output_dir, asdict(task) | asdict(of_student), args)
    try:
        records = all_runs(output_dir, teacher, tokenizer, task, of_student, args, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with what is not finished")
        raise SystemExit(130) from None
    report(output_dir, records, console)


def all_runs(
    output_dir: Path,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ReviewsArguments,
    of_student: StudentArguments,
    args: DistillConfig,
    console: Console,
) -> list[dict[str, Any]]:
    """The record of every loss and seed, from the folder where it is there."""
    train_data = corpus(output_dir, "train", teacher, tokenizer, task, args, console)
    held_out = corpus(output_dir, "eval", teacher, tokenizer, task, args, console)
    records = []
    for seed in task.seeds:
        folder = output_dir / "students" / f"seed{seed}"
        student = warmed_up(folder, seed, teacher, tokenizer, train_data, of_student, args, console)
        for loss in task.losses:
            file = output_dir / "runs" / f"{loss}-seed{seed}" / "record.json"
            if not file.is_file():
                record = run(loss, seed, student, teacher, tokenizer, train_data, held_out, args)
                write(file, json.dumps(record) + "\n")
            records.append(json.loads(file.read_text()))
    return records


def write(file: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def keep_settings(output_dir: Path, task: dict[str, Any], args: DistillConfig) -> None:
    """Keeps the settings that runs must share; refuses a folder that holds runs with others."""
    shared = {k: v for k, v in task.items() if k not in ("losses", "seeds", "threads")}
    own = {f.name for f in fields(DistillConfig)} - {f.name for f in fields(RunArguments)}
    own |= {"max_steps", "learning_rate", "per_device_train_batch_size", "eval_steps"}
    shared |= {name: getattr(args, name) for name in sorted(own - {"loss"})}
    file = output_dir / "settings.json"
    if file.is_file():
        check_settings(file, shared, "runs")
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} holds files of something else; choose another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(shared, indent=2) + "\n")


def corpus(
    output_dir: Path,
    part: str,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ReviewsArguments,
    args: DistillConfig,
    console: Console,
) -> Dataset:
    """Prompts and completions: the teacher's, or (for training) the start of given reviews."""
    file = output_dir / f"{part}.jsonl"
    if not file.is_file():
        if part == "train" and task.texts is not None:
            rows = [{"text": text} for text in load_reviews(task.texts)["text"][: task.corpus_size]]
        else:
            source = EMBEDDED_TRAIN_PROMPTS if part == "train" else EMBEDDED_EVAL_PROMPTS
            count = task.corpus_size if part == "train" else task.num_eval
            known = list(load_prompts(source)["prompt"])
            prompts = [known[i % len(known)] for i in range(count)]
            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task(f"the teacher writes ({part})", total=count)
                responses = sample_responses(
                    teacher,
                    tokenizer,
                    prompts,
                    # Longer than what is used: a text that was cut must not look as if it ended.
                    args.response_length + 12,
                    generator=torch.Generator().manual_seed(0 if part == "train" else 1),
                    batch_size=128,
                    on_batch=lambda done: progress.advance(bar, done),
                )
            pairs = zip(responses.prompts, responses.texts, strict=True)
            rows = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
        write(file, "".join(json.dumps(row) + "\n" for row in rows))
    return Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])


def run(
    loss: str,
    seed: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    held_out: Dataset,
    args: DistillConfig,
) -> dict[str, Any]:
    """One loss from the seed's student: its record.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    begin, cpu_begin = time.perf_counter(), time.process_time()
    config = copy.deepcopy(args)
    config.loss, config.seed = loss, seed
    config.output_dir = str(Path(str(args.output_dir)) / "runs" / f"{loss}-seed{seed}")
    config.disable_tqdm = True
    config.save_strategy = "no"  # pyright: ignore[reportAttributeAccessIssue]
    config.run_name = f"{loss}-seed{seed}"
    shutil.rmtree(config.output_dir, ignore_errors=True)
    trainer = DistillTrainer(
        copy.deepcopy(student),
        teacher,
        config,
        train_data,
        tokenizer,
        eval_dataset=held_out.select(range(min(len(held_out), 64))),
        callbacks=[
            RichProgress(title=f"{NAMES[loss]}, seed {seed}", describe=both_directions),
            StopOnInterrupt(),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()
    with trainer.tracked():
        trainer.train()
        if trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        evaluation = evaluate_student(
            trainer.model,
            teacher,
            tokenizer,
            held_out["prompt"],
            held_out["completion"],
            args.response_length,
            seed=1_000_003,
            batch_size=args.per_device_eval_batch_size,
        )
        log_final({"reviews": evaluation.metrics})
    return {
        "loss": loss,
        "seed": seed,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu_begin, 1),
        "metrics": evaluation.metrics,
        "per_prompt": {
            key: per_prompt(evaluation.records[key.split("/")[0]], key.split("/")[-1])
            for key in DIVERGENCE_COLUMNS
        },
        "course": [
            {
                "step": log["step"],
                "fkl": log["eval_divergence/fkl"],
                "rkl": log["eval_divergence/rkl"],
            }
            for log in [{"step": 0, **before}, *trainer.state.log_history]
            if "eval_divergence/fkl" in log
        ],
        "samples": evaluation.samples.texts[:3],
    }


def per_prompt(record: DivergenceRecord, name: str) -> list[list[float]]:
    """Σ_t of a divergence and the number of tokens, for each prompt."""
    total = sequence_kl(record.divergences[name], record.mask)
    return torch.stack([total, record.mask.sum(1)], 1).tolist()


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
    write(output_dir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
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


if __name__ == "__main__":
    main()
