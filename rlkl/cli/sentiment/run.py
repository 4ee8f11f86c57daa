"""From the settings to the files: measure, train, measure again."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import wandb
from rich.console import Console
from transformers import PrinterCallback
from trl import ModelConfig

from reward_models import EMBEDDED_JUDGE, SentimentReward
from rlkl.cli.errors import check_writable, ending_where_it_diverges, refusing_bad_input
from rlkl.cli.json_output import console_beside, write_json
from rlkl.cli.quiet import quiet_libraries
from rlkl.cli.sentiment.algorithms import Algorithm
from rlkl.cli.sentiment.held_out import HeldOut
from rlkl.cli.sentiment.plot import plot_training
from rlkl.cli.sentiment.results import read_metrics, sample_table, summarise_run
from rlkl.cli.sentiment.settings import SentimentArguments
from rlkl.cli.sentiment.tables import print_samples, print_summary
from rlkl.cli.settings import SettingsParser, adapter_of, load_policy, set_threads
from rlkl.data import EMBEDDED_EVAL_PROMPTS, EMBEDDED_TRAIN_PROMPTS, load_prompts
from rlkl.evaluation import Evaluation
from rlkl.models import check_same_tokenizer, frozen_copy, load_causal_lm, load_tokenizer
from rlkl.trainers import RichProgress, StopOnInterrupt
from rlkl.trainers.processes import of_first
from rlkl.trainers.resume import FREE, check_settings, last_checkpoint
from rlkl.trainers.tracking import wandb_run

_PLOT = "training.png"
_FILES = ("summary.json", "samples.json", "metrics.jsonl", "completions.jsonl", _PLOT)


def run(algorithm: Algorithm, description: str | None, default_config: str) -> None:
    """Reads ``sys.argv``, evaluates, trains and evaluates again; prints and writes the results.

    Of several processes all evaluate before training, so that none waits, and the first one after.

    Args:
        algorithm: what trains.
        description: what ``--help`` says above the options.
        default_config: the YAML that holds without ``--config``.

    Raises:
        SystemExit: 2 for bad input, 1 where training diverges, 130 where it was stopped; the same
            command then goes on.
    """
    with refusing_bad_input():
        parser = SettingsParser(algorithm.settings, description=description)
        task, args, model_args = parser.parse(default_config)
        task.check()
        check_writable(task.json, None)
    with console_beside(task.json) as console:
        summary = _run(algorithm, task, args, model_args, console)
    if task.json is not None and summary is not None:
        write_json(summary, task.json)


def _run(
    algorithm: Algorithm,
    task: SentimentArguments,
    args: Any,
    model_args: ModelConfig,
    console: Console,
) -> dict[str, Any] | None:
    """All but the parsing; the numbers of summary.json, of the first process."""
    begin = time.perf_counter()
    with refusing_bad_input():
        quiet_libraries()
        set_threads(task.threads)
        first = args.process_index == 0  # of torchrun's: it prints and writes
        console.quiet = not first
        trainer, held_out = _prepare(algorithm, task, args, model_args, console)
        output_dir = Path(str(args.output_dir))
        settings = {**asdict(task), **model_args.__dict__, **args.to_dict()}
        del settings["json"]  # of this command, not of the run
        settings["processes"] = args.world_size
        checkpoint = of_first(
            checkpoint_to_resume(output_dir, settings, console) if first else None
        )
        if checkpoint is not None:
            trainer.check_checkpoint(checkpoint)

    kl = algorithm.kl_term(trainer)
    config = settings | {"kl_coef": kl.coefficient}  # which TRL calls beta
    labels = [*algorithm.labels, kl.estimator, kl.placement]
    tags, resume = ["sentiment", *labels], checkpoint is not None
    with (
        ending_where_it_diverges(),
        wandb_run(args, config, group="-".join(labels), tags=tags, resume=resume),
    ):

        def evaluate(label: str) -> Evaluation:
            console.print(f"[dim]{label}: {len(held_out.prompts)} held-out prompts[/dim]")
            return held_out.evaluate(trainer.model, trainer.ref_model)

        before_file = output_dir / "before.pt"
        if checkpoint is None:
            before = evaluate("before training")
            reference = trainer.ref_model if trainer.ref_model is not None else trainer.model
            with trainer.accelerator.autocast():  # in the precision in which the policy samples
                yardstick = held_out.best_of(task.best_of_n, reference, console)
            if first:
                torch.save((before, yardstick), before_file)
        else:
            before, yardstick = torch.load(before_file, weights_only=False)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            console.print(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                "the same command goes on from there"
            )
            raise SystemExit(130)
        if not first:
            return None
        after = evaluate("after training")
        steps = read_metrics(output_dir)
        summary = summarise_run(before, after, yardstick, args.seed, steps)
        summary["seconds"] = round(time.perf_counter() - begin, 1)
        (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        samples = sample_table(before, after)
        (output_dir / "samples.json").write_text(json.dumps(samples, indent=2, ensure_ascii=False))
        title = f"{algorithm.title}, KL by {kl.estimator} in {kl.placement}"
        plot_training(steps, summary, title, algorithm.step, output_dir / _PLOT)
        trainer.save_model(str(output_dir / "policy"))
        _log_results(summary, samples, output_dir / _PLOT)
    if not task.keep_checkpoints:
        for folder in output_dir.glob("checkpoint-*"):
            shutil.rmtree(folder)
    before_file.unlink()
    print_summary(console, summary, title, held_out.response_length)
    print_samples(console, samples)
    written = [name for name in _FILES if (output_dir / name).is_file()]
    console.print(
        f"\nWritten to [bold]{output_dir}[/bold]: {', '.join(written)}, policy/ (for "
        "from_pretrained)" + (", wandb/" if (output_dir / "wandb").is_dir() else "")
    )
    return summary


def _prepare(
    algorithm: Algorithm,
    task: SentimentArguments,
    args: Any,
    model_args: ModelConfig,
    console: Console,
) -> tuple[Any, HeldOut]:
    """Everything that a user's input can get wrong, before any work: the trainer, the prompts."""
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    policy = load_policy(model_args, args.device)
    ref = None
    if task.ref_model_name_or_path is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(task.ref_model_name_or_path))
        ref = frozen_copy(load_causal_lm(task.ref_model_name_or_path))
    reward = SentimentReward(
        task.reward_model,
        positive_label=task.positive_label,
        score=task.reward_score,  # pyright: ignore[reportArgumentType] (checked there)
        clamp=task.reward_clamp,
    )
    judge = SentimentReward(task.judge_model or EMBEDDED_JUDGE)
    train_prompts = load_prompts(task.prompts or EMBEDDED_TRAIN_PROMPTS)
    eval_prompts = load_prompts(task.eval_prompts or EMBEDDED_EVAL_PROMPTS)
    held_out = HeldOut(
        list(eval_prompts["prompt"])[: task.num_eval_prompts],
        tokenizer,
        reward,
        judge,
        response_length=algorithm.response_length(args),
        max_prompt_length=algorithm.max_prompt_length(args),
        temperature=args.temperature,
        seed=args.seed,
    )
    models = [policy] if ref is None else [policy, ref]
    held_out.check_lengths(list(train_prompts["prompt"]), "the training prompts", models)
    held_out.check_lengths(held_out.prompts, "the held-out prompts", models)
    args.disable_tqdm = True  # the progress bar is ours
    trainer = algorithm.trainer_class(args)(
        model=policy,
        reward_funcs=reward,
        args=args,
        train_dataset=train_prompts,
        processing_class=tokenizer,
        ref_model=ref,
        peft_config=adapter_of(model_args, policy),
        judges={"held_out": judge},
        callbacks=[RichProgress(console, algorithm.title), StopOnInterrupt()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.check_optimiser()
    return trainer, held_out


def checkpoint_to_resume(
    output_dir: Path, settings: dict[str, Any], console: Console
) -> str | None:
    """The last checkpoint of an unfinished run with the same settings; clears a finished run's
    folder.

    Raises:
        ValueError: the folder holds an unfinished run with other settings, or something else.
    """
    kept = {k: v for k, v in settings.items() if k not in FREE}
    file = output_dir / "settings.json"
    checkpoint = last_checkpoint(output_dir)
    if file.is_file() and checkpoint is not None and (output_dir / "before.pt").is_file():
        check_settings(file, kept, "an unfinished run")
        console.print(f"going on from {checkpoint}")
        return checkpoint
    completions = output_dir / "completions"  # TRL's GRPO makes it with the trainer, if it logs any
    logs_completions = completions.is_dir()
    found = list(output_dir.iterdir()) if output_dir.is_dir() else []
    made_now = found == [completions] and logs_completions and not any(completions.iterdir())
    if found and not made_now and not file.is_file():
        raise ValueError(f"{output_dir} holds files of something else; choose another --output_dir")
    if output_dir.is_dir():
        if (output_dir / "summary.json").is_file():
            console.print(f"[dim]replacing the finished run in {output_dir}[/dim]")
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True)
    if logs_completions:
        completions.mkdir()
    file.write_text(json.dumps(kept, indent=2, default=str) + "\n")
    return None


def _log_results(summary: dict[str, Any], samples: list[dict[str, Any]], plot: Path) -> None:
    """What a run ends with, to the open W&B run."""
    if wandb.run is not None:
        wandb.run.summary.update(summary)
        wandb.run.log(
            {
                "samples": wandb.Table(
                    columns=list(samples[0]), data=[list(row.values()) for row in samples]
                ),
                "plot": wandb.Image(str(plot)),
            }
        )
