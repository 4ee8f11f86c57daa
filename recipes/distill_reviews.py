"""Which divergence teaches a small review LM best? Seven losses at equal steps, over seeds.

    python recipes/distill_reviews.py                    # everything, to runs/distill_reviews
    python recipes/distill_reviews.py --losses akl fkl --seeds 0 --max_steps 20 \
        --output_dir runs/quick
    python recipes/distill_reviews.py --texts my_reviews.jsonl --output_dir runs/mine

The teacher (the embedded review LM) writes a corpus; for each seed a student of a fifth of its size
is warmed up on it by cross-entropy, and every loss starts from that same student and sees the same
batches. Held-out prompts measure both directions: forward KL on the teacher's texts, reverse KL on
the student's own samples, both exact per token. Ends with a table (mean ± standard error over
seeds), the paired differences of AKL with their 95% intervals, and a plot of held-out KL over
steps.

Settings come from the YAML file (default: distill_reviews.yaml beside this script), then from the
command line. What is finished is kept: the same command goes on where it was stopped.
"""

import copy
import json
import math
import os
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import t as student_t
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.utils import logging

from rlkl.cli import SettingsParser, refusing_bad_input
from rlkl.data import EMBEDDED_EVAL_PROMPTS, EMBEDDED_TRAIN_PROMPTS, load_prompts, load_reviews
from rlkl.evaluation.student import evaluate_student
from rlkl.kl import fused_logp_loss
from rlkl.models import load_causal_lm, load_tokenizer, output_head, response_hidden
from rlkl.rollout import given_responses, sample_responses
from rlkl.trainers import DistillConfig, DistillTrainer, RichProgress, StopOnInterrupt
from rlkl.trainers.distill_metrics import both_directions
from rlkl.trainers.run_config import RunArguments

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
    student_width: int = field(default=96, metadata={"help": "n_embd of the student."})
    student_layers: int = field(default=4, metadata={"help": "n_layer of the student."})
    texts: str | None = field(
        default=None, metadata={"help": "Reviews to train on (jsonl or hub id); None: teacher's."}
    )
    corpus_size: int = field(default=4096, metadata={"help": "Training texts."})
    num_eval: int = field(default=256, metadata={"help": "Held-out prompts."})
    warm_up_steps: int = field(default=256, metadata={"help": "Cross-entropy steps; 0: random."})
    warm_up_learning_rate: float = field(default=3e-3, metadata={"help": "Peak; falls to 0."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; None: torch's choice."}
    )


def main() -> None:
    console = Console()
    with refusing_bad_input():
        parser = SettingsParser(
            (ReviewsArguments, DistillConfig),  # pyright: ignore[reportArgumentType]
            description=__doc__,
        )
        task, args = parser.parse(str(HERE / "distill_reviews.yaml"))
        unknown = [loss for loss in task.losses if loss not in NAMES]
        if unknown:
            raise ValueError(f"losses: {unknown[0]!r} is unknown; use some of {', '.join(NAMES)}")
        if not task.seeds or not task.losses:
            raise ValueError("losses and seeds must each name at least one")
        quiet()
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        tokenizer, teacher = load_tokenizer(task.teacher), load_causal_lm(task.teacher).eval()
        output_dir = Path(str(args.output_dir))
        check_settings(output_dir, task, args)
    train_data = corpus(output_dir, "train", teacher, tokenizer, task, args, console)
    held_out = corpus(output_dir, "eval", teacher, tokenizer, task, args, console)
    records = []
    for seed in task.seeds:
        student = warmed_up(output_dir, seed, teacher, tokenizer, train_data, task, args, console)
        for loss in task.losses:
            file = output_dir / "runs" / f"{loss}-seed{seed}" / "record.json"
            if not file.is_file():
                record = run(loss, seed, student, teacher, tokenizer, train_data, held_out, args)
                if record is None:
                    console.print("stopped; the same command goes on with this run")
                    raise SystemExit(130)
                file.write_text(json.dumps(record, indent=2) + "\n")
            records.append(json.loads(file.read_text()))
    report(output_dir, records, console)


def quiet() -> None:
    """Leaves the screen to the recipe."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")


def check_settings(output_dir: Path, task: ReviewsArguments, args: DistillConfig) -> None:
    """Keeps the settings that runs must share; refuses a folder that holds runs with others."""
    free = ("losses", "seeds", "threads")
    shared: dict[str, Any] = {k: v for k, v in asdict(task).items() if k not in free}
    own = {f.name for f in fields(DistillConfig)} - {f.name for f in fields(RunArguments)}
    own |= {"max_steps", "learning_rate", "per_device_train_batch_size", "eval_steps"}
    shared |= {name: getattr(args, name) for name in sorted(own - {"loss"})}
    shared = json.loads(json.dumps(shared))
    file = output_dir / "settings.json"
    if file.is_file():
        earlier = json.loads(file.read_text())
        differing = [k for k in shared if earlier.get(k) != shared[k]]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{output_dir} holds runs with {key}={earlier.get(key)}, not {shared[key]}: choose "
                "another --output_dir, or delete that folder"
            )
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
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, file)
    return Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])


def warmed_up(
    output_dir: Path,
    seed: int,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    task: ReviewsArguments,
    args: DistillConfig,
    console: Console,
) -> PreTrainedModel:
    """The student from which all losses of a seed start: random, then taught by cross-entropy."""
    folder = output_dir / "students" / f"seed{seed}"
    if folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = copy.deepcopy(teacher.config)
    config.n_embd, config.n_layer = task.student_width, task.student_layers
    torch.manual_seed(seed)
    student = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    share = student.num_parameters() / teacher.num_parameters()
    console.print(f"student: {student.num_parameters():,} parameters, {share:.0%} of the teacher")
    optimizer = torch.optim.AdamW(student.parameters(), lr=task.warm_up_learning_rate)
    steps, batch_size = task.warm_up_steps, args.per_device_train_batch_size
    generator = torch.Generator().manual_seed(seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / max(1, steps))
    )
    with Progress(console=console, transient=True) as progress:
        for _ in progress.track(range(steps), description=f"warm-up, seed {seed}"):
            rows = torch.randint(len(data), (batch_size,), generator=generator)
            batch = data[rows.tolist()]
            prompts = batch.get("prompt")
            completions = batch["text"] if prompts is None else batch["completion"]
            responses = given_responses(tokenizer, prompts, completions, args.response_length)
            length = responses.tokens.shape[1]
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16)):
                hidden = response_hidden(
                    student, responses.input_ids, responses.attention_mask, length
                )
            loss, _ = fused_logp_loss(
                lambda stats, count: -(stats.policy_logp / count).sum(),
                hidden[responses.mask],
                output_head(student),
                responses.tokens[responses.mask],
                responses.mask.sum().expand(int(responses.mask.sum())),
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    student.save_pretrained(folder)
    return student


def run(
    loss: str,
    seed: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    held_out: Dataset,
    args: DistillConfig,
) -> dict[str, Any] | None:
    """One loss from the seed's student: its record, or None if it was stopped."""
    begin = time.perf_counter()
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
    trainer.train()
    if trainer.state.global_step < trainer.state.max_steps:
        return None
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
    return {
        "loss": loss,
        "seed": seed,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - begin, 1),
        "metrics": evaluation.metrics,
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


def report(output_dir: Path, records: list[dict[str, Any]], console: Console) -> None:
    """The table, the paired differences of AKL, the plot; all of it in summary.json too."""
    losses = list(dict.fromkeys(record["loss"] for record in records))
    seeds = sorted({record["seed"] for record in records})
    by_loss = {loss: {r["seed"]: r for r in records if r["loss"] == loss} for loss in losses}
    table = Table(title=f"Held-out prompts, mean ± standard error; seeds: {len(seeds)}")
    for name in ("loss", *(title for title, _ in COLUMNS.values()), "seconds"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    summary: dict[str, Any] = {"seeds": seeds, "losses": {}, "akl_minus": {}}
    for loss, runs in by_loss.items():
        cells, values = [], {}
        for key in COLUMNS:
            mean, stderr = mean_and_error([r["metrics"][key] for r in runs.values()])
            values[key], values[f"{key}_se"] = mean, stderr
            cells.append(f"{mean:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{mean:.3f}")
        seconds = sum(r["seconds"] for r in runs.values()) / len(runs)
        summary["losses"][loss] = values | {"seconds": round(seconds, 1)}
        table.add_row(NAMES[loss], *cells, f"{seconds:.0f}")
    console.print(table)
    console.print("; ".join(f"{title}: {what}" for title, what in COLUMNS.values()))
    console.print(both_start(records))
    for rival in [r for r in RIVALS if r in by_loss and "akl" in by_loss]:
        line = []
        for key in list(COLUMNS)[:3]:
            common = sorted(set(by_loss["akl"]) & set(by_loss[rival]))
            differences = [
                by_loss["akl"][s]["metrics"][key] - by_loss[rival][s]["metrics"][key]
                for s in common
            ]
            mean, half = paired_interval(differences)
            summary["akl_minus"].setdefault(rival, {})[key] = {"mean": mean, "ci95": half}
            line.append(f"{COLUMNS[key][0]} {mean:+.4f} ± {half:.4f} ({verdict(mean, half)})")
        console.print(f"AKL minus {NAMES[rival]}: " + "; ".join(line))
    console.print(
        "± after a difference is a 95% interval (paired by seed, Student's t); below 0 AKL is "
        "closer to the teacher."
    )
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
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


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds; inf for a single one."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else math.inf


def paired_interval(differences: list[float]) -> tuple[float, float]:
    """Mean difference and half of its 95% interval; inf for a single seed."""
    mean, stderr = mean_and_error(differences)
    if len(differences) < 2:
        return mean, math.inf
    return mean, float(student_t.ppf(0.975, len(differences) - 1)) * stderr


def verdict(mean: float, half: float) -> str:
    """What the interval allows to say."""
    if abs(mean) <= half:
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
    axes[0].legend(frameon=False, ncols=2)
    figure.savefig(output_dir / "held_out.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
