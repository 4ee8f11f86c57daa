"""Which divergence teaches a small review LM best? Seven losses at equal steps, over seeds.

    python recipes/distill_reviews.py                    # everything, to runs/distill_reviews
    python recipes/distill_reviews.py --losses akl fkl --seeds 0 --output_dir runs/quick
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from distill_report import DIVERGENCE_COLUMNS, NAMES, report
from distill_students import StudentArguments, check_shape, warmed_up
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from rlkl.cli import SettingsParser, refusing_bad_input
from rlkl.cli.quiet import quiet_libraries
from rlkl.cli.settings import set_threads
from rlkl.data import EMBEDDED_EVAL_PROMPTS, EMBEDDED_TRAIN_PROMPTS, load_prompts, load_reviews
from rlkl.evaluation.student import evaluate_student
from rlkl.kl import sequence_kl
from rlkl.models import load_causal_lm, load_tokenizer
from rlkl.rollout import DivergenceRecord, sample_responses
from rlkl.trainers import DistillConfig, DistillTrainer, RichProgress, StopOnInterrupt
from rlkl.trainers.distill_metrics import both_directions
from rlkl.trainers.resume import FREE, check_settings
from rlkl.trainers.tracking import log_final

HERE = Path(__file__).parent


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
        for name, least in (("corpus_size", 1), ("num_eval", 2)):  # two prompts have a spread
            if getattr(task, name) < least:
                raise ValueError(f"{name} is {getattr(task, name)}; give at least {least}")
        quiet_libraries()
        args.disable_tqdm = True  # the progress bar is ours
        set_threads(task.threads)
        tokenizer, teacher = load_tokenizer(task.teacher), load_causal_lm(task.teacher).eval()
        if teacher.config.model_type != "gpt2":
            raise ValueError(
                f"teacher is a {teacher.config.model_type}; the student's shape is known here for "
                "gpt2 alone: use rlkl distill with a student of your own"
            )
        check_shape(of_student, teacher)
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
    own = (*FREE, "losses", "seeds", "loss", "seed")  # a run's own, or of no effect on it
    whole = {**task, **args.to_dict()}
    shared = {k: v for k, v in whole.items() if k not in own and not k.startswith("wandb_")}
    file = output_dir / "settings.json"
    if file.is_file():
        check_settings(file, shared, "runs")
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} holds files of something else; choose another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(shared, indent=2, default=str) + "\n")


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
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # Where the teacher ended at once there is no text to learn from.
    return Dataset.from_list(
        [row for row in rows if row.get("completion", row.get("text")).strip()]
    )


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


if __name__ == "__main__":
    main()
