"""Time and memory of the exact token KL from hidden states, beside other ways to have it.

    python recipes/benchmarks/fused_kl.py                             # 1 thread, 2048x50257x768
    python recipes/benchmarks/fused_kl.py --threads 2 --neighbour 2   # beside busy processes
    python recipes/benchmarks/fused_kl.py --only naive fused --shapes 512x4096x256

In every round each variant is a fresh process (fused_kl_worker.py). The processes of a shape wait
for each other and are measured in turn, forwards and backwards, so that a slow second of the
machine hits all of them. Ratios are medians over turns of ratios within a turn; those of time are
of CPU seconds with one thread and no neighbour, else of wall seconds; those of memory are of the
first turns, before a process keeps any of it.

Every measurement is appended to measurements.jsonl with the machine's description; the table and
time_and_memory.png are made from those of this run. Linux only: the peak of memory is the system's
count of the process's resident memory.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("fused_kl_worker.py")
VARIANTS = [
    "naive",
    "fused",
    "bare_products",
    "fused_sampled",
    "fused_recompute",
    "compiled",
    "trl",
]
MORE = ["naive_sampled", "liger"]
LABELS = {
    "naive": "naive torch",
    "naive_sampled": "naive torch, sampled KL",
    "compiled": "naive, torch.compile",
    "fused": "rlkl, one pass",
    "fused_recompute": "rlkl, any later loss",
    "fused_sampled": "rlkl, sampled KL",
    "bare_products": "its matrix products alone",
    "trl": "TRL ChunkedDivergence",
    "liger": "Liger chunked JSD",
    "ppo_naive": "PPO step, naive sampled KL",
    "ppo_fused": "PPO step, rlkl exact KL",
}


class Ratio(NamedTuple):
    """A quantity of one variant over that of another, and how small it is meant to be."""

    title: str
    variant: str
    over: str
    gradient: bool
    field: str
    goal: float | None


# The gradient of the head, which every way must hold, is another share of each shape.
MEMORY_GOALS = {
    (2048, 50257, 768): 0.11,
    (4096, 50257, 768): 0.055,
    (1024, 151936, 1024): 0.25,
}
RATIOS = [
    Ratio("memory with gradient, over naive", "fused", "naive", True, "memory_mb", None),
    Ratio("time with gradient, over naive", "fused", "naive", True, "time", 0.70),
    Ratio("time with gradient, over its products", "fused", "bare_products", True, "time", 1.15),
    Ratio("value only: time over naive", "fused", "naive", False, "time", 0.60),
    Ratio("value only: memory over naive", "fused", "naive", False, "memory_mb", 0.05),
    Ratio("exact over sampled, with gradient", "fused", "fused_sampled", True, "time", 1.05),
    Ratio("exact over sampled, value only", "fused", "fused_sampled", False, "time", 1.05),
    Ratio("time with gradient, over TRL", "fused", "trl", True, "time", 0.5),
    Ratio("memory with gradient, over TRL", "fused", "trl", True, "memory_mb", 0.1),
    Ratio("PPO step, exact fused over sampled naive", "ppo_fused", "ppo_naive", True, "time", 0.95),
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["2048x50257x768"], help="tokens x vocabulary x width"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of every variant")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes of every variant")
    parser.add_argument("--turns", type=int, default=3, help="measurements of every process")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS + MORE, default=VARIANTS, help="variants to measure"
    )
    parser.add_argument(
        "--value_only", action="store_true", help="only without gradient (default: both)"
    )
    parser.add_argument(
        "--gradient_only", action="store_true", help="only with gradient (default: both)"
    )
    parser.add_argument(
        "--ppo", action="store_true", help="also whole PPO steps (384 tokens, 4 epochs, width 256)"
    )
    parser.add_argument(
        "--neighbour", type=int, default=0, help="busy processes beside every measurement"
    )
    parser.add_argument(
        "--liger_python", type=Path, help="interpreter of an environment that has liger-kernel"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/fused_kl"))
    args = parser.parse_args()
    if min(args.rounds, args.turns, args.threads) < 1 or args.neighbour < 0:
        parser.error("--rounds, --turns and --threads must be at least 1, --neighbour at least 0")
    if args.value_only and args.gradient_only:
        parser.error("--value_only and --gradient_only exclude each other")
    written = " ".join(args.shapes)
    try:
        args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    except ValueError:
        parser.error(f"--shapes {written}: write tokens x vocabulary x width, as 2048x50257x768")
    if any(len(shape) != 3 or min(shape) < 1 for shape in args.shapes):
        parser.error("--shapes: three positive numbers each, as 2048x50257x768")
    if not Path("/proc/self/clear_refs").exists():
        parser.error("this needs Linux (/proc) to measure the peak of memory")
    return args


def machine() -> dict[str, Any]:
    """What a reader needs to judge the seconds."""
    lines = [
        x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
    ]
    return {
        "cpu": lines[0].partition(":")[2].strip() if lines else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Busy processes: each multiplies matrices on one thread."""
    busy = "import torch; torch.set_num_threads(1); x = torch.randn(1024, 1024)\nwhile True: x @ x"
    processes = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(count)]
    try:
        time.sleep(3 if count else 0)  # until they are busy
        yield
    finally:
        for process in processes:
            process.kill()


class Worker:
    """A process that measures one variant whenever it is asked; in its context it is ready."""

    def __init__(self, python: Path, spec: dict[str, Any]):
        self.python, self.spec = python, spec
        self.error: str | None = None
        """Why it ended, if it did: the last line that it wrote."""

    def __enter__(self) -> Self:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.spec["threads"]),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        with contextlib.ExitStack() as stack:
            self.errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            self.process = stack.enter_context(
                subprocess.Popen(
                    [str(self.python), "-W", "ignore", str(WORKER), json.dumps(self.spec)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors,
                    text=True,
                )
            )
            stack.callback(self.process.kill)
            self.read()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def read(self) -> str:
        """The next line that it prints; "" and an error once it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            self.error = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        return line

    def measure(self, turn: int) -> dict[str, Any]:
        """A measurement beside its settings, or the error."""
        assert self.process.stdin is not None
        load = os.getloadavg()[0]
        with contextlib.suppress(BrokenPipeError):  # it ended meanwhile
            print(turn, file=self.process.stdin, flush=True)
        line = self.read()
        if self.error is not None:
            return self.spec | {"error": self.error}
        found = json.loads(line)
        if turn > 0:  # the process keeps some of the first turn's memory
            del found["memory_mb"]
        return self.spec | {"turn": turn, "load_before": load} | found


def in_turn(workers: list[Worker], turns: int) -> Iterator[dict[str, Any]]:
    """What the processes measure, forwards and backwards."""
    yield from (worker.spec | {"error": worker.error} for worker in workers if worker.error)
    for turn in range(turns):
        for worker in workers[:: -1 if turn % 2 else 1]:
            if worker.error is None:
                yield worker.measure(turn)


def plan(args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """What a round measures; the variants of a list in turn."""
    passes = [True] * (not args.value_only) + [False] * (not args.gradient_only)
    cases = [
        (args.only, {"n": n, "vocab": vocab, "width": width, "gradient": gradient})
        for n, vocab, width in args.shapes
        for gradient in passes
    ]
    if args.ppo:
        step = {"n": 384, "vocab": 50257, "width": 256, "gradient": True}
        cases.append((["ppo_naive", "ppo_fused"], step))
    load = {"threads": args.threads, "neighbours": args.neighbour}
    return [[{"variant": v} | case | load for v in variants] for variants, case in cases]


def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """All rounds; every measurement is written as it comes, and Ctrl-C keeps those made."""
    groups, records = plan(args), []
    failed: dict[str, str] = {}
    pythons = {"liger": args.liger_python or Path(sys.executable)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with (
        (args.output_dir / "measurements.jsonl").open("a") as file,
        neighbours(args.neighbour),
        Progress(transient=True, console=console) as progress,
        contextlib.suppress(KeyboardInterrupt),
    ):
        bar = progress.add_task("", total=args.rounds * args.turns * sum(map(len, groups)))
        for number, specs in itertools.product(range(args.rounds), groups):
            progress.update(bar, description=f"round {number + 1}")
            with contextlib.ExitStack() as stack:
                workers = [
                    Worker(pythons.get(spec["variant"], Path(sys.executable)), spec)
                    for spec in ({**spec, "round": number} for spec in specs)
                    if spec["variant"] not in failed
                ]
                for worker in workers:
                    stack.enter_context(worker)
                for record in in_turn(workers, args.turns):
                    file.write(json.dumps(record | {"machine": machine()}) + "\n")
                    file.flush()
                    if "error" in record:
                        failed[record["variant"]] = record["error"]
                    else:
                        records.append(record)
                        progress.advance(bar)
    for variant, error in failed.items():
        console.print(f"{LABELS.get(variant, variant)} could not be measured: {error}")
    return records


def of(records: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    return [record for record in records if settings.items() <= record.items()]


def ratio(records: list[dict[str, Any]], wanted: Ratio, **settings: Any) -> list[float]:
    """The ratio within each turn that has both; "time" is the CPU's where one thread has it."""
    found, field = [], wanted.field
    if field == "time":
        alone = all(r["threads"] == 1 and not r["neighbours"] for r in records)
        field = "cpu" if alone else "wall"
    for record in of(records, variant=wanted.variant, gradient=wanted.gradient, **settings):
        for other in of(
            records,
            variant=wanted.over,
            gradient=wanted.gradient,
            round=record["round"],
            turn=record["turn"],
            **settings,
        ):
            if field in record and other.get(field):  # 0 MB over 0 MB says nothing
                found.append(record[field] / other[field])
    return found


def shapes_of(records: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    return list(dict.fromkeys((r["n"], r["vocab"], r["width"]) for r in records))


def tables(records: list[dict[str, Any]]) -> Iterator[Table]:
    for n, vocab, width in shapes_of(records):
        shape = {"n": n, "vocab": vocab, "width": width}
        here = of(records, **shape)
        title = f"{n} × {vocab} × {width}, {here[0]['threads']} thread(s)"
        if here[0]["neighbours"]:
            title += f", {here[0]['neighbours']} busy neighbour(s)"
        table = Table(title=title)
        for name in ("", "gradient", "seconds", "CPU s", "MB", "time ÷ naive", "memory ÷ naive"):
            table.add_column(name, justify="left" if not name else "right")
        for gradient in (True, False):
            for variant in dict.fromkeys(r["variant"] for r in of(here, gradient=gradient)):
                rows = of(here, variant=variant, gradient=gradient)
                base = "ppo_naive" if variant.startswith("ppo_") else "naive"
                cells = [
                    f"{statistics.median(r[field] for r in rows if field in r):.{digits}f}"
                    for field, digits in (("wall", 2), ("cpu", 2), ("memory_mb", 0))
                ]
                for field in ("time", "memory_mb"):
                    found = ratio(here, Ratio("", variant, base, gradient, field, None))
                    cells.append(f"{statistics.median(found):.2f}" if found else "")
                table.add_row(LABELS.get(variant, variant), "yes" if gradient else "no", *cells)
        yield table
        goals = Table(title="goals")
        for name in ("ratio", "goal", "measured", "quartiles", ""):
            goals.add_column(name, justify="left" if name in ("", "ratio") else "right")
        for wanted in RATIOS:
            if found := ratio(here, wanted):
                middle = statistics.median(found)
                quartiles = statistics.quantiles(found, method="inclusive") if found[1:] else found
                goal = wanted.goal or MEMORY_GOALS.get((n, vocab, width))
                verdict = "" if goal is None else "met" if middle <= goal else "not met"
                goals.add_row(
                    wanted.title,
                    "" if goal is None else f"≤ {goal}",
                    f"{middle:.3f}",
                    f"{quartiles[0]:.3f}–{quartiles[-1]:.3f}",
                    verdict,
                )
        if goals.row_count:
            yield goals


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory of every variant, with gradient, by shape."""
    shapes = shapes_of([r for r in records if not r["variant"].startswith("ppo_")])
    if not shapes:
        return
    figure, axes = plt.subplots(
        len(shapes), 2, figsize=(9, 0.8 + 2.6 * len(shapes)), squeeze=False, layout="constrained"
    )
    for row, (n, vocab, width) in zip(axes, shapes, strict=True):
        here = of(records, n=n, vocab=vocab, width=width)
        names = [v for v in VARIANTS + MORE if of(here, variant=v)][::-1]
        for axis, field, label in zip(row, ("wall", "memory_mb"), ("seconds", "MB"), strict=True):
            for gradient, colour, shift in ((True, "#1f6f8b", 0.2), (False, "#c4a35a", -0.2)):
                rows = [of(here, variant=v, gradient=gradient) for v in names]
                values = [
                    statistics.median(r[field] for r in found if field in r) if found else 0
                    for found in rows
                ]
                label_of = "with gradient" if gradient else "value only"
                if any(values):
                    places = [i + shift for i in range(len(names))]
                    axis.barh(places, values, 0.38, color=colour, label=label_of)
            axis.set_yticks(range(len(names)), [LABELS[v] for v in names])
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_title(f"{n} tokens, vocabulary {vocab}, width {width}", loc="left", fontsize=10)
        row[1].set_yticklabels([])
    axes[0, 1].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    begin = time.perf_counter()
    records = measure(args, console)
    if not records:
        raise SystemExit("nothing was measured")
    for table in tables(records):
        console.print(table)
    plot(records, args.output_dir / "time_and_memory.png")
    busy = max(record["load_before"] for record in records)
    if not args.neighbour and busy > (os.cpu_count() or 1) / 2 + 1:
        console.print(f"The machine was busy (load up to {busy:.1f}): ratios are scattered.")
    console.print(machine())
    console.print(f"{time.perf_counter() - begin:.0f} s; kept in {args.output_dir}")


if __name__ == "__main__":
    main()
