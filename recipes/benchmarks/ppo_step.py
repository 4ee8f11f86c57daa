"""Seconds per whole PPO update: rlkl beside `trl==1.12.0`, the last TRL with a PPO trainer.

    python recipes/benchmarks/ppo_step.py --make_trl_env runs/trl_env   # once: an environment
    python recipes/benchmarks/ppo_step.py --trl_python runs/trl_env/bin/python
    python recipes/benchmarks/ppo_step.py --profile             # rlkl's parts beside their floors

Both sides load the same model (the embedded review LM's architecture with random weights, unless
--model_name_or_path names another), sample as many responses to the same prompts, and make as many
optimiser steps on them. Every measurement is a fresh process; the contenders take turns. What is
equal and what is not:

- TRL's gradient checkpointing is switched off: its default is on and recomputes every forward.
- Reward: nothing that costs time on either side (TRL: the last token's id; rlkl: characters of the
  text).
- Critic: rlkl reads values off the policy's trunk in the policy's own pass. TRL runs a value model
  by itself. *trunk* gives it that same function, a linear head on the policy's trunk. *free* gives
  it one number per token id, the cheapest value model that it accepts and worse than any real one:
  a lower bound of TRL's time.
- Attention: "default" is what each side picks: sdpa in transformers, eager in rlkl on a CPU.
- rlkl measures more on the way: the exact KL with its standard error, entropy, value statistics.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step_floors import StepShape, module_floors, step_floors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORKER = Path(__file__).with_name("ppo_step_worker.py")
ROOT = Path(__file__).resolve().parents[2]
TRL_REQUIREMENTS = ["trl==1.12.0", "transformers==5.23.0"]
PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    side: str
    precision: str
    attention: str = "default"
    critic: str = "trunk"


FEW = [
    Contender("rlkl", "fp32"),
    Contender("trl", "fp32"),
    Contender("rlkl", "bf16"),
    Contender("trl", "fp32", attention="eager"),
    Contender("trl", "fp32", attention="eager", critic="free"),
]
MORE = [
    Contender("rlkl_exact", "fp32"),
    Contender("rlkl", "fp32", attention="sdpa"),
    Contender("trl", "fp32", critic="free"),
    Contender("rlkl_exact", "bf16"),
    Contender("trl", "bf16"),
    Contender("trl", "bf16", attention="eager"),
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trl_python", type=Path, help="Python of an environment with trl==1.12.0")
    parser.add_argument(
        "--make_trl_env", type=Path, metavar="DIR", help="create that environment and stop"
    )
    parser.add_argument(
        "--profile", action="store_true", help="rlkl's parts beside their floating-point floors"
    )
    parser.add_argument(
        "--all", action="store_true", help="more rows: exact KL, other attention, critic and bf16"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mini_batches", type=int, nargs="+", default=[1], help="e.g. 1 4")
    parser.add_argument("--repetitions", type=int, default=2, help="processes per row")
    parser.add_argument("--updates", type=int, default=1, help="measured updates per process")
    parser.add_argument("--warm_up", type=int, default=1, help="updates before them")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of updates: exact, sampled KL")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--response_length", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--model_name_or_path", help="a causal LM; 'embedded' is the review LM")
    parser.add_argument(
        "--prompts", type=Path, help="with --model_name_or_path: a file; default: rlkl's own"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ppo_step"))
    return parser.parse_args()


def make_trl_env(folder: Path) -> Path:
    """A virtual environment with trl==1.12.0; torch first, so that a CPU build stays."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    version = torch.__version__.partition("+")[0]
    for requirements in ([f"torch=={version}"], TRL_REQUIREMENTS):
        subprocess.run([str(python), "-m", "pip", "install", *requirements], check=True)
    return python


# ---- what both sides load ------------------------------------------------------------------------


def write_random_model(folder: Path) -> None:
    """The embedded review LM's architecture with random weights, and a tokenizer of 4096 words."""
    words = ["<|endoftext|>", "<|pad|>", *(f"w{i}" for i in range(2, 4096))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[0], pad_token=words[1]
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=128,
        n_embd=256,
        n_layer=4,
        n_head=4,
        activation_function="gelu",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def random_prompts(count: int) -> list[str]:
    """Prompts of 6 to 8 tokens with the opening token, in the random model's vocabulary."""
    draw = random.Random(0)
    return [
        " ".join(f"w{draw.randrange(2, 4096)}" for _ in range(draw.randint(5, PROMPT_TOKENS - 1)))
        for _ in range(count)
    ]


def short_prompts(model: str, source: Path | None, count: int) -> list[str]:
    """Prompts of a file, or the openings that ship with rlkl, cut to 7 of the model's tokens."""
    from rlkl.data.prompts import EMBEDDED_TRAIN_PROMPTS, load_prompts
    from rlkl.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    texts = list(load_prompts(source or EMBEDDED_TRAIN_PROMPTS)["prompt"])[:count]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [str(tokenizer.decode(row[: PROMPT_TOKENS - 1])) for row in ids]


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every process is told: model, prompts, sizes."""
    count = max(256, 2 * args.batch_size)
    if args.model_name_or_path is None:
        model = str(folder / "model")
        write_random_model(Path(model))
        prompts = random_prompts(count)
    else:
        from rlkl.models import EMBEDDED_LM

        model = args.model_name_or_path
        model = str(EMBEDDED_LM) if model == "embedded" else model
        prompts = short_prompts(model, args.prompts, count)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return {
        "model": model,
        "prompts": str(folder / "prompts.json"),
        "folder": str(folder / "out"),
        "batch_size": args.batch_size,
        "response_length": args.response_length,
        "epochs": args.epochs,
        "warm_up": args.warm_up,
        "updates": args.updates,
        "seed": 0,
    }


# ---- measuring -----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a reader needs to judge the seconds."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "system": platform.platform(),
    }


def run_worker(python: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """One process; its measurements with its settings and the machine's load before it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(spec["threads"]),
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    load = os.getloadavg()[0]
    done = subprocess.run(
        [str(python), str(WORKER), json.dumps(spec)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{python} failed on {spec}:\n{done.stderr[-3000:]}")
    return spec | {"load_before": load} | json.loads(done.stdout.splitlines()[-1])


class Measurements:
    """All processes' measurements, written to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._machine = machine()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record | {"machine": self._machine}) + "\n")
        return record

    def seconds(self, settings: dict[str, Any], clock: str = "wall") -> list[float]:
        """Seconds of the updates of every process with these settings."""
        rows = [record for record in self.records if settings.items() <= record.items()]
        return [seconds for row in rows for seconds in row[clock]]


def race(
    args: argparse.Namespace,
    common: dict[str, Any],
    contenders: list[Contender],
    file: Measurements,
) -> None:
    """Every contender in turn, `repetitions` times, for every number of threads and minibatches."""
    settings = [
        {"threads": threads, "mini_batches": mini_batches}
        for threads in args.threads
        for mini_batches in args.mini_batches
    ]
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=args.repetitions * len(settings) * len(contenders))
        for repetition in range(args.repetitions):
            for setting in settings:
                for contender in contenders:
                    progress.update(bar, description=f"{contender.side} {contender.precision}")
                    python = args.trl_python if contender.side == "trl" else Path(sys.executable)
                    spec = common | setting | vars(contender) | {"repetition": repetition}
                    file.add(run_worker(python, spec))
                    progress.advance(bar)


def race_table(
    file: Measurements, contenders: list[Contender], threads: int, mini_batches: int
) -> Table:
    """Seconds per update, and each row's ratio to rlkl's sampled KL in float32 and in bf16."""
    here = {"threads": threads, "mini_batches": mini_batches}
    plural = "" if threads == 1 else "s"
    table = Table(
        title=f"{threads} thread{plural}, minibatches per epoch: {mini_batches}",
        caption="÷ fp32, ÷ bf16: over the seconds of rlkl's sampled KL in that precision",
    )
    for name in ("", "precision", "attention", "critic"):
        table.add_column(name, no_wrap=True)
    for name in ("s/update", "min–max", "CPU s", "÷ fp32", "÷ bf16"):
        table.add_column(name, justify="right", no_wrap=True)
    rivals = {
        precision: file.seconds(vars(Contender("rlkl", precision)) | here)
        for precision in ("fp32", "bf16")
    }
    for contender in contenders:
        where = vars(contender) | here
        wall = file.seconds(where)
        middle = statistics.median(wall)
        used = next(r["attention_used"] for r in file.records if where.items() <= r.items())
        default = " (default)" if contender.attention == "default" else ""
        table.add_row(
            {"trl": "TRL 1.12", "rlkl": "rlkl, sampled KL", "rlkl_exact": "rlkl, exact KL"}[
                contender.side
            ],
            contender.precision,
            used + default,
            contender.critic,
            f"{middle:.2f}",
            f"{min(wall):.2f}–{max(wall):.2f}",
            f"{statistics.median(file.seconds(where, 'cpu')):.2f}",
            *(
                f"{middle / statistics.median(rivals[precision]):.2f}" if rivals[precision] else ""
                for precision in ("fp32", "bf16")
            ),
        )
    return table


def exact_beside_sampled(
    args: argparse.Namespace, common: dict[str, Any], file: Measurements
) -> Table:
    """What the exact KL adds to rlkl's own sampled-KL update, in pairs within one process."""
    table = Table(title="exact KL ÷ sampled KL, updates in turn in one process")
    for name in ("precision", "threads", "sampled s", "exact s", "ratio", "quartiles", "CPU ratio"):
        table.add_column(name, justify="right")
    for precision in ("fp32", "bf16"):
        spec = common | {
            "side": "exact_beside_sampled",
            "precision": precision,
            "attention": "default",
            "threads": args.threads[0],
            "mini_batches": args.mini_batches[0],
            "updates": args.pairs,
        }
        record = file.add(run_worker(Path(sys.executable), spec))
        ratios = {
            clock: [
                exact / sampled
                for exact, sampled in zip(
                    record[clock]["rlkl_exact"], record[clock]["rlkl"], strict=True
                )
            ]
            for clock in ("wall", "cpu")
        }
        low, middle, high = statistics.quantiles(ratios["wall"], n=4)
        table.add_row(
            precision,
            str(spec["threads"]),
            f"{statistics.median(record['wall']['rlkl']):.2f}",
            f"{statistics.median(record['wall']['rlkl_exact']):.2f}",
            f"{middle:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{statistics.median(ratios['cpu']):.3f}",
        )
    return table


def profile(args: argparse.Namespace, common: dict[str, Any], file: Measurements) -> list[Table]:
    """Where rlkl's update goes, beside the bare products and the transformers module."""
    tables = []
    config = AutoConfig.from_pretrained(common["model"])
    shape = StepShape.of(config, args.batch_size, PROMPT_TOKENS, args.response_length)
    for threads in args.threads:
        for precision in ("fp32", "bf16"):
            spec = common | vars(Contender("rlkl", precision))
            spec |= {"threads": threads, "mini_batches": args.mini_batches[0]}
            record = file.add(run_worker(Path(sys.executable), spec))
            parts = {name: statistics.median(x) for name, x in record["parts"].items()}
            torch.set_num_threads(threads)
            bare = step_floors(
                shape, args.epochs, torch.bfloat16 if precision == "bf16" else torch.float32
            )
            model = GPT2LMHeadModel.from_pretrained(
                common["model"], attn_implementation=record["attention_used"]
            ).eval()
            module = module_floors(model, shape, args.epochs, bf16=precision == "bf16")
            module["generation"] += bare["sampling_heads"]
            module["statistics"] += 2 * bare["head_forward"]
            module["optimisation"] += args.epochs * bare["head_forward_backward"]
            file.add(spec | {"side": "floors", "bare": bare, "module": module})
            plural = "" if threads == 1 else "s"
            table = Table(title=f"rlkl {precision}, {threads} thread{plural}: seconds per update")
            table.add_column("part")
            for name in ("seconds", "share", "bare products", "×", "module + head", "×"):
                table.add_column(name, justify="right")
            step = statistics.median(record["wall"])
            for part in ("generation", "scoring", "statistics", "optimisation"):
                seconds = parts[f"time/{part}"]
                cells = [part, f"{seconds:.3f}", f"{seconds / step:.0%}"]
                for floors in (bare, module):
                    if part in floors:
                        cells += [f"{floors[part]:.3f}", f"{seconds / floors[part]:.2f}"]
                table.add_row(*cells)
            table.add_row("whole update", f"{step:.3f}")
            for part in ("trunk_forward", "trunk_forward_backward"):
                name = f"  one {part.replace('_', ' ')}"
                table.add_row(name, "", "", f"{bare[part]:.3f}", "", f"{module[part]:.3f}", "")
            tables.append(table)
    return tables


def main() -> None:
    args = parse_args()
    if args.make_trl_env is not None:
        print(f"--trl_python {make_trl_env(args.make_trl_env)}")
        return
    console = Console(width=None if sys.stdout.isatty() else 110)
    begin = time.perf_counter()
    file = Measurements(args.output_dir / "measurements.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        common = prepare(args, Path(folder))
        if args.profile:
            for table in profile(args, common, file):
                console.print(table)
        else:
            contenders = FEW + MORE if args.all else FEW
            if args.trl_python is None:
                console.print("Without --trl_python only rlkl is measured (see --make_trl_env).")
                contenders = [c for c in contenders if c.side != "trl"]
            race(args, common, contenders, file)
            for threads in args.threads if args.repetitions else ():
                for mini_batches in args.mini_batches:
                    console.print(race_table(file, contenders, threads, mini_batches))
            if args.pairs > 1:
                console.print(exact_beside_sampled(args, common, file))
    versions = {tuple(sorted(r["versions"].items())) for r in file.records if "versions" in r}
    busy = max(r.get("load_before", 0.0) for r in file.records)
    if busy > machine()["cores"] / 2:
        console.print(
            f"The machine was busy (load up to {busy:.1f}): the seconds are too long and "
            "scattered; with 1 thread, CPU seconds are the fairer measure."
        )
    console.print({**machine(), "versions": [dict(v) for v in versions]})
    console.print(f"{time.perf_counter() - begin:.0f} s; every measurement: {file.path}")


if __name__ == "__main__":
    main()
