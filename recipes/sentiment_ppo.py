"""Sentiment-controlled fine-tuning: a review LM learns to write positive reviews under a KL
penalty.

    python recipes/sentiment_ppo.py                           # the embedded models, on a CPU
    python recipes/sentiment_ppo.py --kl_estimator k1 --seed 1 --output_dir runs/k1
    python recipes/sentiment_ppo.py --config recipes/sentiment_ppo_gpt2.yaml

Settings come from the YAML file (default: sentiment_ppo.yaml beside this script), then from the
command line. A run that was stopped goes on from its last checkpoint when the same command is
given again.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import wandb
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import ModelConfig, get_peft_config

from reward_models import EMBEDDED_JUDGE, RewardModel, SentimentReward
from rlkl.cli import SettingsParser, refusing_bad_input
from rlkl.cli.quiet import quiet_libraries
from rlkl.cli.settings import set_threads
from rlkl.data import EMBEDDED_EVAL_PROMPTS, EMBEDDED_TRAIN_PROMPTS, load_prompts
from rlkl.evaluation import BestOfN, Evaluation, best_of_n, evaluate_policy
from rlkl.models import check_same_tokenizer, frozen_copy, load_causal_lm, load_tokenizer
from rlkl.trainers import (
    PPOConfig,
    PPOTrainer,
    RaoBlackwellPPOTrainer,
    RichProgress,
    StopOnInterrupt,
)
from rlkl.trainers.resume import FREE, check_settings, last_checkpoint
from rlkl.trainers.tracking import wandb_run

HERE = Path(__file__).parent


@dataclass
class SentimentArguments:
    """What is trained towards and measured, beside PPOConfig (how) and TRL's ModelConfig (what
    model)."""

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model; None: the policy as it starts."}
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "Sequence classifier (hub id or folder); None: the embedded."},
    )
    positive_label: str | None = field(
        default=None, metadata={"help": "Name of its positive label; None: found by its name."}
    )
    reward_score: str = field(
        default="log_odds", metadata={"help": "log_odds, or logit: the raw positive logit."}
    )
    reward_clamp: float | None = field(
        default=None,
        metadata={"help": "Scores are limited to ± this, where the classifier saturates."},
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "Second classifier, reported and never trained on; None: the embedded."},
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Training prompts: txt, jsonl, csv, hub id; None: embedded."},
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts, likewise; None: embedded."}
    )
    num_eval_prompts: int = field(default=256, metadata={"help": "Held-out prompts to use."})
    best_of_n: int = field(default=64, metadata={"help": "n of the best-of-n yardstick."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; None: torch's choice."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Leave the checkpoints of a finished run (for a sweep)."}
    )


SETTINGS = (SentimentArguments, PPOConfig, ModelConfig)
"""What the YAML and the command line may set; a sweep checks its cells against it."""


def main() -> None:
    console = Console()
    begin = time.perf_counter()
    with refusing_bad_input():
        parser = SettingsParser(
            SETTINGS,
            description=__doc__,
        )
        task, args, model_args = parser.parse(str(HERE / "sentiment_ppo.yaml"))
        for name in ("num_eval_prompts", "best_of_n"):  # one prompt has no spread, one draw no best
            if getattr(task, name) < 2:
                raise ValueError(f"{name} is {getattr(task, name)}; give at least 2")
        quiet_libraries()
        set_threads(task.threads)
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        policy = load_causal_lm(
            model_args.model_name_or_path, attn_implementation=model_args.attn_implementation
        )
        ref = None
        if task.ref_model_name_or_path is not None:
            check_same_tokenizer(tokenizer, load_tokenizer(task.ref_model_name_or_path))
            ref = frozen_copy(load_causal_lm(task.ref_model_name_or_path))
        reward = SentimentReward(
            task.reward_model,
            positive_label=task.positive_label,
            score=task.reward_score,
            clamp=task.reward_clamp,
        )
        judge = SentimentReward(task.judge_model or EMBEDDED_JUDGE)
        train_prompts = load_prompts(task.prompts or EMBEDDED_TRAIN_PROMPTS)
        eval_prompts = load_prompts(task.eval_prompts or EMBEDDED_EVAL_PROMPTS)
        held_out = list(eval_prompts["prompt"])[: task.num_eval_prompts]
        args.disable_tqdm = True  # the progress bar is ours
        kl_estimator = args.kl_estimator or "rb"
        trainer_class = RaoBlackwellPPOTrainer if kl_estimator == "rb" else PPOTrainer
        trainer = trainer_class(
            policy,
            reward,
            args,
            train_prompts,
            tokenizer,
            ref_model=ref,
            peft_config=get_peft_config(model_args),
            judges={"held_out": judge},
            callbacks=[RichProgress(console), StopOnInterrupt()],
        )
        trainer.remove_callback(PrinterCallback)
        output_dir = Path(str(args.output_dir))
        settings = {**asdict(task), **model_args.__dict__, **args.to_dict()}
        checkpoint = checkpoint_to_resume(output_dir, settings, console)

    names = [trainer.estimator.name, str(trainer.placement)]
    tags, resume = ["sentiment", *names], checkpoint is not None
    with wandb_run(args, settings, group="-".join(names), tags=tags, resume=resume):
        reference = trainer.ref_model if trainer.ref_model is not None else trainer.model

        def evaluate(label: str) -> Evaluation:
            console.print(f"[dim]{label}: {len(held_out)} held-out prompts[/dim]")
            return evaluate_policy(
                trainer.model,
                trainer.ref_model,
                tokenizer,
                held_out,
                reward,
                args.response_length,
                judges={"held_out": judge},
                temperature=args.temperature,
                max_prompt_length=args.max_prompt_length,
                seed=args.seed + 1_000_003,
            )

        before_file = output_dir / "before.pt"
        if checkpoint is None:
            before = evaluate("before training")
            with trainer.accelerator.autocast():  # in the precision in which the policy samples
                yardstick = measure_best_of_n(
                    reference, tokenizer, held_out, reward, task, args, console
                )
            torch.save((before, yardstick), before_file)
        else:
            before, yardstick = torch.load(before_file, weights_only=False)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            console.print(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                "the same command goes on from there"
            )
            sys.exit(130)
        after = evaluate("after training")
        summary = summarise_run(before, after, yardstick, args.seed, read_metrics(output_dir))
        summary["seconds"] = round(time.perf_counter() - begin, 1)
        (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        samples = sample_table(before, after)
        (output_dir / "samples.json").write_text(json.dumps(samples, indent=2, ensure_ascii=False))
        plot = plot_training(output_dir, summary, names)
        policy_dir = output_dir / "policy"
        trainer.save_model(str(policy_dir))
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
    if not task.keep_checkpoints:
        for folder in output_dir.glob("checkpoint-*"):
            shutil.rmtree(folder)
    before_file.unlink()
    print_summary(console, summary, samples, names, args.response_length)
    console.print(
        f"\nWritten to [bold]{output_dir}[/bold]: summary.json, samples.json, metrics.jsonl, "
        f"completions.jsonl, {plot.name}, policy/ (for from_pretrained)"
        + (", wandb/" if (output_dir / "wandb").is_dir() else "")
    )


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
    if output_dir.is_dir() and any(output_dir.iterdir()) and not file.is_file():
        raise ValueError(f"{output_dir} holds files of something else; choose another --output_dir")
    if output_dir.is_dir():
        if (output_dir / "summary.json").is_file():
            console.print(f"[dim]replacing the finished run in {output_dir}[/dim]")
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True)
    file.write_text(json.dumps(kept, indent=2, default=str) + "\n")
    return None


def measure_best_of_n(
    reference: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    reward: RewardModel,
    task: SentimentArguments,
    args: PPOConfig,
    console: Console,
) -> BestOfN:
    """Best-of-n of the reference on the held-out prompts, with a progress bar."""
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"best of {task.best_of_n}", total=len(prompts) * task.best_of_n)
        return best_of_n(
            reference,
            tokenizer,
            prompts,
            reward,
            task.best_of_n,
            args.response_length,
            temperature=args.temperature,
            max_prompt_length=args.max_prompt_length,
            seed=args.seed,
            on_batch=lambda done: progress.advance(bar, done),
        )


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """The records of the training steps."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "kl/rb" in (record := json.loads(line))]


def summarise_run(
    before: Evaluation,
    after: Evaluation,
    yardstick: BestOfN,
    seed: int,
    steps: list[dict[str, float]],
) -> dict[str, Any]:
    """The numbers of a run: held-out reward, judge and KL, and the share of the gap to
    best-of-n."""
    start, end = before.metrics, after.metrics
    ratios = [step["kl/k1_se"] / step["kl/rb_se"] for step in steps if step["kl/rb_se"] > 0]
    gap = yardstick.reward - yardstick.mean_score
    return {
        "reward_before": start["objective/scores"],
        "reward_before_se": start["objective/scores_se"],
        "reward_after": end["objective/scores"],
        "reward_se": end["objective/scores_se"],
        "judge_before": start["judge/held_out"],
        "judge_before_se": start["judge/held_out_se"],
        "judge_after": end["judge/held_out"],
        "judge_se": end["judge/held_out_se"],
        "positive_before": before.positive[0],
        "positive_before_se": before.positive[1],
        "positive_after": after.positive[0],
        "positive_se": after.positive[1],
        f"best_of_{yardstick.n}": yardstick.reward,
        f"best_of_{yardstick.n}_se": yardstick.stderr,
        "reference_reward": yardstick.mean_score,
        "gap_closed": (end["objective/scores"] - yardstick.mean_score) / gap,
        "kl_rb": end["kl/rb"],
        "kl_rb_se": end["kl/rb_se"],
        "kl_k1": end["kl/k1"],
        "kl_k1_se": end["kl/k1_se"],
        "kl_rb_per_token": end["kl/rb_per_token"],
        "kl_of_best_of_n_bound": yardstick.kl_bound,
        "initial_kl": steps[0]["kl/rb"],
        "initial_ratio_error": steps[0]["val/first_ratio_error"],
        "train_se_ratio_k1_over_rb": median(ratios) if ratios else None,
        "steps": len(steps),
        "seed": seed,
    }


def sample_table(before: Evaluation, after: Evaluation, count: int = 5) -> list[dict[str, Any]]:
    """The first held-out prompts with the responses before and after: not picked."""
    rows = []
    for i in range(min(count, len(before.rollout))):
        old, new = before.rollout, after.rollout
        rows.append(
            {
                "prompt": old.responses.prompts[i],
                "before": old.responses.texts[i],
                "before_reward": round(float(old.scores[i]), 2),
                "after": new.responses.texts[i],
                "after_reward": round(float(new.scores[i]), 2),
            }
        )
    return rows


def print_summary(
    console: Console,
    summary: dict[str, Any],
    samples: list[dict[str, Any]],
    names: list[str],
    response_length: int,
) -> None:
    """The tables that end a run."""

    def interval(mean: float, se: float, percent: bool = False) -> str:
        if percent:
            return f"{mean:.1%} ± {1.96 * se:.1%}"
        return f"{mean:+.2f} ± {1.96 * se:.2f}"

    table = Table(title=f"Held-out prompts, {names[0]} in {names[1]} (± is a 95% interval)")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key, se, percent in (
        ("reward (log-odds of positive)", "reward", "reward", False),
        ("judge (never trained on)", "judge", "judge", False),
        ("positive share", "positive", "positive", True),
    ):
        table.add_row(
            label,
            interval(summary[f"{key}_before"], summary[f"{se}_before_se"], percent),
            interval(summary[f"{key}_after"], summary[f"{se}_se"], percent),
        )
    for name in ("rb", "k1"):
        exact = "exact per token" if name == "rb" else "sampled"
        kl = f"{summary[f'kl_{name}']:.2f} ± {1.96 * summary[f'kl_{name}_se']:.2f}"
        table.add_row(f"KL by {name} ({exact}), nats per response", "0", kl)
    console.print(table)
    best = next(key for key in summary if key.startswith("best_of_") and not key.endswith("_se"))
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


def plot_training(output_dir: Path, summary: dict[str, Any], names: list[str]) -> Path:
    """Reward and KL over the steps, with the yardsticks, as a PNG."""
    steps = read_metrics(output_dir)
    x = [step["step"] for step in steps]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")

    def band(axis: Any, key: str, label: str, color: str) -> None:
        mean = torch.tensor([step[key] for step in steps])
        error = 1.96 * torch.tensor([step[f"{key}_se"] for step in steps])
        axis.plot(x, mean, color=color, label=label)
        axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)

    best = next(key for key in summary if key.startswith("best_of_") and not key.endswith("_se"))
    band(top, "objective/scores", "reward", "tab:blue")
    band(top, "judge/held_out", "judge (never trained on)", "tab:orange")
    top.axhline(summary[best], color="0.4", linestyle="--", linewidth=1)
    top.text(x[0], summary[best], f" {best.replace('_', '-')}", va="bottom", color="0.4")
    top.axhline(summary["reference_reward"], color="0.7", linestyle=":", linewidth=1)
    top.text(x[-1], summary["reference_reward"], "reference ", va="bottom", ha="right", color="0.5")
    top.set_ylabel("log-odds of positive")
    top.set_title(f"PPO, KL by {names[0]} in {names[1]}, seed {summary['seed']}")
    top.legend(loc="lower right", frameon=False)
    band(bottom, "kl/k1", "k1 (sampled)", "tab:red")
    band(bottom, "kl/rb", "rb (exact per token)", "tab:green")
    bottom.set_ylabel("KL from the reference,\nnats per response")
    bottom.set_xlabel("step (one rollout, all its epochs)")
    bottom.legend(loc="upper left", frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    path = output_dir / "training.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
