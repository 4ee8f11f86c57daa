r"""Distillation of a causal LM: a student learns its teacher's next-token distributions.

    rlkl distill --config recipes/distill_instruct.yaml --loss akl --seed 1
    rlkl distill --model_name_or_path gpt2 --teacher_model_name_or_path gpt2-large \
        --train_data train.jsonl --eval_data eval.jsonl --output_dir runs/mine --max_steps 500

Data: prompt and completion, instructions, or plain text. Settings come from the YAML file, then
from the command line. A run that was stopped goes on when the same command is given again.
"""

import json
import math
import os
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
with redirect_stdout(sys.stderr):  # where it says that WANDB_MODE is offline
    import transformers.integrations.integration_utils  # noqa: F401

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import ModelConfig

from rlkl.cli.errors import check_writable, ending_where_it_diverges, refusing_bad_input
from rlkl.cli.json_output import console_beside, write_json
from rlkl.cli.quiet import quiet_libraries
from rlkl.cli.settings import SettingsParser, adapter_of, load_policy, set_threads
from rlkl.data import load_pairs
from rlkl.evaluation.judge import JUDGE_PROMPT, Judge
from rlkl.evaluation.student import StudentEvaluation, evaluate_student
from rlkl.models import check_same_tokenizer, load_causal_lm, load_tokenizer
from rlkl.trainers import DistillConfig, DistillTrainer, RichProgress, StopOnInterrupt
from rlkl.trainers.distill_data import check_data
from rlkl.trainers.distill_metrics import both_directions
from rlkl.trainers.processes import of_first
from rlkl.trainers.resume import FREE, check_settings, last_checkpoint
from rlkl.trainers.tracking import log_final

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class DistillArguments:
    """Teacher, data and judge, beside DistillConfig (how) and TRL's ModelConfig (the student)."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder; None: the embedded review LM."}
    )
    teacher_dtype: str = field(
        default="float32", metadata={"help": f"Of the teacher's weights: {', '.join(_DTYPES)}."}
    )
    train_data: str | None = field(
        default=None,
        metadata={"help": "jsonl(.xz), json, csv or hub id: prompt and completion, …, or text."},
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out data, likewise; several are reported apart, by file name."},
    )
    eval_references: str | None = field(
        default=None,
        metadata={"help": "Answers, joined by question_id to rows without one (Vicuna's)."},
    )
    num_eval: int = field(default=256, metadata={"help": "Rows of each held-out set to use."})
    judge_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint, up to and with /v1."}
    )
    judge_model: str = field(default="default", metadata={"help": "The judge's name there."})
    judge_prompt: str | None = field(
        default=None, metadata={"help": "File with {prompt} and {response}; None: the shipped."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; None: torch's choice."}
    )
    json: str | None = field(
        default=None,
        metadata={
            "help": "Write the numbers of summary.json here too; '-' is standard output, and "
            "everything else then goes to standard error."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.eval_data, str):  # eval_data: FILE in a YAML file
            self.eval_data = [self.eval_data]


def run() -> None:
    """Reads ``sys.argv``, trains, evaluates, prints and writes ``summary.json``."""
    with refusing_bad_input():
        parser = SettingsParser(
            (DistillArguments, DistillConfig, ModelConfig),
            description=__doc__,
        )
        task, args, model_args = parser.parse()
        check_writable(task.json, None)
    with console_beside(task.json) as console:
        summary = _run(task, args, model_args, console)
    if task.json is not None and summary is not None:
        write_json(summary, task.json)


def _run(
    task: DistillArguments, args: DistillConfig, model_args: ModelConfig, console: Console
) -> dict[str, dict[str, float]] | None:
    """All but the parsing; the numbers of summary.json, of the first process."""
    with refusing_bad_input():
        quiet_libraries()
        set_threads(task.threads)
        first = args.process_index == 0  # of torchrun's: it prints and writes
        console.quiet = not first
        trainer, tokenizer, held_out, judge = _prepare(task, args, model_args, console)
        output_dir = Path(str(args.output_dir))
        settings = {**asdict(task), **model_args.__dict__, **args.to_dict()}
        del settings["json"]  # of this command, not of the run
        settings["processes"] = args.world_size
        checkpoint = of_first(_unfinished(output_dir, settings, console) if first else None)
        if checkpoint is not None:
            trainer.check_checkpoint(checkpoint)
    with ending_where_it_diverges(), trainer.tracked(resume=checkpoint is not None):
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            console.print(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                "the same command goes on from there"
            )
            raise SystemExit(130)
        if not first:
            return None
        trainer.save_model(str(output_dir / "student"))
        tokenizer.save_pretrained(output_dir / "student")
        summary = {}
        for name, data in held_out.items():
            evaluation = _evaluate(name, data, trainer, tokenizer, judge, args, console)
            summary[name] = evaluation.metrics
            rows = zip(evaluation.samples.prompts, evaluation.samples.texts, strict=True)
            lines = (json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows)
            (output_dir / f"samples_{name}.jsonl").write_text("".join(lines))
        write_json(summary, str(output_dir / "summary.json"))
        log_final(summary)
    _print(summary, console)
    console.print(
        f"Written to {output_dir}: student/ (for from_pretrained), metrics.jsonl, summary.json, "
        "samples_*.jsonl"
    )
    return summary


def _prepare(
    task: DistillArguments, args: DistillConfig, model_args: ModelConfig, console: Console
) -> tuple[DistillTrainer, PreTrainedTokenizerBase, dict[str, Dataset], Judge | None]:
    """Everything that a user's input can get wrong, before any work."""
    if task.train_data is None:
        raise ValueError("train_data is missing: name a file or hub id (--train_data FILE)")
    _check_names(task, model_args)
    if task.teacher_dtype not in _DTYPES:
        raise ValueError(f"teacher_dtype is {task.teacher_dtype!r}; use {', '.join(_DTYPES)}")
    train = load_pairs(task.train_data)
    if args.reads_answers and "completion" in train.column_names:
        answered = [i for i, answer in enumerate(train["completion"]) if answer.strip()]
        if 0 < len(answered) < len(train):
            left_out = len(train) - len(answered)
            console.print(f"left out: {left_out:,} of {len(train):,} training rows have no answer")
            train = train.select(answered)
    if task.num_eval < 1:
        raise ValueError(f"num_eval is {task.num_eval}; give at least 1, or no eval_data")
    held_out, joined = {}, task.eval_references is None
    for name, source in _named(task.eval_data).items():
        data = load_pairs(source, task.eval_references)
        if "prompt" not in data.column_names:
            raise ValueError(f"{source} has no prompts: evaluation samples responses to prompts")
        joined = joined or data["completion"] != load_pairs(source)["completion"]
        held_out[name] = data.select(range(min(len(data), task.num_eval)))
    if not joined:  # no error: the recipe names references for one of its sets
        console.print(
            f"{task.eval_references} answers no held-out row: references are joined by question_id "
            "to rows without an answer of their own"
        )
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    check_same_tokenizer(tokenizer, load_tokenizer(task.teacher_model_name_or_path))
    teacher = load_causal_lm(
        task.teacher_model_name_or_path, dtype=getattr(torch, task.teacher_dtype)
    )
    student = load_policy(model_args, args.device)
    for name, data in held_out.items():
        models = (student, teacher)
        check_data(data, name, tokenizer, models, args, given=False, sampled=True)
    judge = None
    if task.judge_url is not None:
        template = Path(task.judge_prompt or JUDGE_PROMPT).read_text()
        judge = Judge(
            task.judge_url,
            task.judge_model,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            template=template,
            cache=Path(str(args.output_dir)) / "verdicts.jsonl",
        )
    args.disable_tqdm = True  # the progress bar is ours
    trainer = DistillTrainer(
        student,
        teacher,
        args,
        train,
        tokenizer,
        peft_config=adapter_of(model_args, student),
        callbacks=[
            RichProgress(console, title=args.loss, describe=both_directions),
            StopOnInterrupt(),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.check_optimiser()
    return trainer, tokenizer, held_out, judge


def _check_names(task: DistillArguments, model_args: ModelConfig) -> None:
    """Refuses empty names, and settings that are of others which are not there.

    Raises:
        ValueError: says which.
    """
    named = {**asdict(task), "model_name_or_path": model_args.model_name_or_path}
    for name, value in named.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError(f"{name} is empty: name one, or leave it out")
    for needed, names in (
        ("eval_data", ("eval_references", "judge_url")),
        ("judge_url", ("judge_prompt",)),
    ):
        for name in names:
            if named[name] is not None and not named[needed]:
                raise ValueError(f"{name} has no meaning without {needed}: give both, or neither")


def _named(sources: list[str]) -> dict[str, str]:
    """Each by its file name without endings, after as many folders as it takes to tell them apart.

    Raises:
        ValueError: no folder tells them apart.
    """
    paths = [Path(source) for source in sources]
    names: list[str] = []
    for depth in range(max((len(path.parts) for path in paths), default=0)):
        folders = [path.parent.parts[-depth:] if depth else () for path in paths]
        names = [
            "-".join([*above, path.name.split(".")[0]]).replace(":", "-").replace("/", "")
            for above, path in zip(folders, paths, strict=True)
        ]
        if len(set(names)) == len(names):
            return dict(zip(names, sources, strict=True))
    if names:
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"eval_data: two sets are called {twice!r}; rename one of them")
    return {}


def _unfinished(output_dir: Path, settings: dict[str, Any], console: Console) -> str | None:
    """The last checkpoint of a stopped run with the same settings; removes what a finished run
    left, but for the judge's verdicts: each says what it is of.

    Raises:
        ValueError: the folder holds a stopped run with other settings, or a run of something else.
    """
    kept = {k: v for k, v in settings.items() if k not in FREE and not k.startswith("judge_")}
    file, summary = output_dir / "settings.json", output_dir / "summary.json"
    # The summary last: while it is there the run is finished, and none goes on from it.
    names = ("checkpoint-*", "student", "metrics.jsonl", "samples_*.jsonl", "summary.json")
    written = [path for name in names for path in sorted(output_dir.glob(name))]
    if written and not file.is_file():
        raise ValueError(
            f"{output_dir} holds {written[0].name} of something else: choose another --output_dir"
        )
    checkpoint = None if summary.is_file() else last_checkpoint(output_dir)
    if checkpoint is not None:
        trained = {k: v for k, v in kept.items() if k != "num_eval" and not k.startswith("eval_")}
        check_settings(file, trained, "an unfinished run")
        console.print(f"going on from {checkpoint}")
    else:
        if summary.is_file():
            console.print(f"[dim]replacing the finished run in {output_dir}[/dim]")
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2, default=str) + "\n")
    return checkpoint


def _evaluate(
    name: str,
    data: Dataset,
    trainer: DistillTrainer,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge | None,
    args: DistillConfig,
    console: Console,
) -> StudentEvaluation:
    with Progress(console=console, transient=True) as progress:
        answered = sum(bool(completion.strip()) for completion in data["completion"])
        total = (2 if judge is None else 3) * len(data) + answered
        bar = progress.add_task(f"held out: {name}", total=total)
        with refusing_bad_input():  # a judge that does not answer
            return evaluate_student(
                trainer.model,
                trainer.teacher,
                tokenizer,
                data["prompt"],
                data["completion"],
                args.response_length,
                judge=judge,
                max_prompt_length=args.max_prompt_length,
                temperature=args.sampling_temperature,
                head_mass=args.head_mass,
                head_rule=args.head_rule,  # pyright: ignore[reportArgumentType] (checked)
                seed=args.seed + 1_000_003,
                batch_size=args.per_device_eval_batch_size,
                vocab_size=trainer.vocab_size,
                on_batch=lambda done: progress.advance(bar, done),
            )


def _print(summary: dict[str, dict[str, float]], console: Console) -> None:
    """One column a held-out set; ± is a standard error over prompts."""
    rows = {
        "prompts": "prompts",
        "rouge_l_n": "of them with a reference",
        "held_out/divergence/fkl": "forward KL on the references, nats per token",
        "held_out/divergence/rkl": "reverse KL on the references, nats per token",
        "own/divergence/rkl": "reverse KL on its own samples, nats per token",
        "own/divergence/rkl_per_response": "the same, nats per response",
        "perplexity": "perplexity of the references",
        "rouge_l": "ROUGE-L of its samples",
        "distinct_2": "distinct-2",
        "self_bleu": "self-BLEU",
        "judge/quality": "judge: quality, 1 to 10",
        "judge/diversity": "judge: diversity, 1 to 10",
        "judge/failed": "judge: answers that do not parse",
    }
    table = Table(title="The student on held-out prompts (± is a standard error)")
    table.add_column("")
    for name in summary:
        table.add_column(name, justify="right")
    for key, label in rows.items():
        if not any(key in metrics for metrics in summary.values()):
            continue
        cells = []
        for metrics in summary.values():
            error = metrics.get(f"{key}_se", math.inf)  # inf: of a single prompt
            digits = 0 if key in ("prompts", "rouge_l_n", "judge/failed") else 3
            value = f"{metrics[key]:.{digits}f}" if key in metrics else "–"
            cells.append(f"{value} ± {error:.3f}" if math.isfinite(error) else value)
        table.add_row(label, *cells)
    if summary:
        console.print(table)
