"""`rlkl sweep`: run a sweep of KL coefficients, join one, look at it, report it."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from rlkl.cli.errors import check_writable, fail, refusing_bad_input
from rlkl.cli.json_output import console_beside, write_json

if TYPE_CHECKING:
    from rlkl.cli.sentiment.algorithms import Algorithm
    from rlkl.sweep.export import Analysis
    from rlkl.sweep.ledger import Ledger
    from rlkl.sweep.records import SweepResult

sweep_app = typer.Typer(
    help="Sweeps of KL coefficients: reward-vs-KL frontiers, resumable and comparable.",
    no_args_is_help=True,
)

Spec = Annotated[
    Path | None, typer.Argument(help="The sweep's YAML, or its folder.", show_default=False)
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="SQLAlchemy address (sqlite:///…, postgresql://…); default: what OUT remembers from "
        "the last time (never the password: set PGPASSWORD), else OUT/sweep.db."
    ),
]
Name = Annotated[str | None, typer.Option(help="Which sweep, where the storage holds several.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the sweep; default: runs/NAME.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of a cell; default: shared out.")
]
Recipe = Annotated[
    Path | None, typer.Option(help="This machine's copy of the recipe, where it lies elsewhere.")
]
JsonOut = Annotated[str | None, typer.Option("--json", help="Write as JSON to a file, or - here.")]


def command_named(algorithm: str) -> "Algorithm":
    """What a sweep reads of the command `rlkl ALGORITHM`: its settings and their defaults."""
    from rlkl.cli.sentiment.algorithms import ALGORITHMS  # slow to import

    return ALGORITHMS[algorithm.upper()]


@sweep_app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="The sweep's YAML.")],
    storage: Storage = None,
    out: Out = None,
    workers: Annotated[int, typer.Option(min=1, help="Local worker processes.")] = 1,
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and the time; start nothing.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
    json: JsonOut = None,
) -> None:
    """Run a sweep on this machine; the same command goes on with one that was stopped or killed.

    rlkl sweep run recipes/sweep_kl.yaml --dry-run

    rlkl sweep run recipes/sweep_kl.yaml --workers 2

    --json has the cells at the end, as `status --json` has them.
    """
    with console_beside(json) as console:
        ledger = _run(console, spec, storage, out, workers, threads, dry_run, report, json)
    if ledger is None:
        return
    cells = ledger.cells(records=False)
    if json is not None:
        write_json(_progress(ledger), json)
    failed = sum(cell.state == "failed" for cell in cells)  # the reference's too
    if failed:
        fail(f"{failed} cells failed; see above, then: rlkl sweep retry {spec}")


def _run(
    console: Console,
    spec: Path,
    storage: str | None,
    out: Path | None,
    workers: int,
    threads: int | None,
    dry_run: bool,
    report: bool,
    json: str | None,
) -> "Ledger | None":
    """Runs a sweep to its end; None where it is only shown."""
    with refusing_bad_input():
        check_writable(json, None)
        from rlkl.sweep.driver import Driver, begin_sweep, default_folder
        from rlkl.sweep.spec_file import load_spec
        from rlkl.sweep.status import duration, status_table
        from rlkl.sweep.storage import Remembered, default_storage, remembered, shown

        with console.status("reading the spec and checking every cell's settings"):
            loaded = load_spec(spec, command_named)
        folder = out or default_folder(loaded)
        if dry_run:
            print_plan(console, loaded, workers)
            return None
        where = Remembered(storage) if storage else remembered(folder)
        where = where or Remembered(default_storage(folder))
        with where.refused():
            ledger = begin_sweep(loaded, where.storage, folder)
        driver = Driver(ledger, folder, workers, threads)
    rows = max(10, console.height - 8)
    console.print(f"[dim]{folder}, {shown(where.storage)}; Ctrl-C stops with checkpoints[/dim]")
    begin = time.monotonic()
    try:
        with Live(console=console, refresh_per_second=2) as live:
            driver.run(
                lambda: live.update(status_table(ledger.cells(), ledger.spec, workers, rows))
            )
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the checkpoints")
        raise SystemExit(130) from None
    except RuntimeError as error:
        fail(str(error))
    if not console.is_terminal:
        console.print()  # a live display ends its line on terminals alone
    console.print(f"all cells have ended, after {duration(time.monotonic() - begin)}")
    cells = ledger.cells(records=False)
    if report and any(cell.state == "done" and cell.configuration >= 0 for cell in cells):
        from rlkl.sweep.records import collect

        _write_report(console, collect(ledger), folder / "report", ledger.identity)
    return ledger


def print_plan(console: Console, spec, workers: int) -> None:
    """The cells of a sweep and how long they would take."""
    from rlkl.sweep.spec import iterate_cells
    from rlkl.sweep.status import duration, seconds_left

    if spec.search is None:
        for configuration, seed in iterate_cells(spec):
            console.print(f"{configuration.number:03d}-seed{seed}  {configuration.label}")
    else:
        ranges = ", ".join(f"{k} in {v}" for k, v in spec.search.fields.items())
        arms = ", ".join(dict.fromkeys(spec.arm_name(arm) for arm in spec.arms))
        console.print(
            f"{spec.search.configurations} configurations chosen by {spec.search.sampler}, in "
            f"turns for {arms}: {ranges}; seeds {spec.seeds}",
            markup=False,
        )
    left = seconds_left([], spec, workers)
    time_needed = (
        "unknown until the first cell has ended (minutes_per_cell in the spec says it before)"
        if left is None
        else duration(left)
    )
    console.print(f"{spec.num_cells} cells with {workers} worker(s): {time_needed}")


@sweep_app.command()
def work(
    storage: Annotated[str, typer.Option(help="The sweep's storage.")],
    name: Name = None,
    out: Out = None,
    threads: Threads = None,
    recipe: Recipe = None,
    json: JsonOut = None,
) -> None:
    """Join a sweep as one more worker, from any machine that reaches its storage.

    rlkl sweep work --storage postgresql://me@host/sweeps --name sweep_kl

    --json has the cells as `status --json` has them, when this worker has ended or was stopped, and
    its name among their workers.
    """
    with refusing_bad_input():
        check_writable(json, None)
        from rlkl.sweep.ledger import Ledger
        from rlkl.sweep.storage import remember
        from rlkl.sweep.worker import Worker

        ledger = Ledger(storage, name)
        stop = threading.Event()
        folder = out or Path("runs") / ledger.name
        worker = Worker(
            ledger,
            folder,
            threads or os.cpu_count() or 1,
            recipe=None if recipe is None else str(recipe.resolve()),
            stop=stop,
        )
        remember(folder, storage, ledger.name)
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    with console_beside(json) as console:
        console.print(f"working on {ledger.name}; Ctrl-C stops with a checkpoint")
        worker.work()
        if not stop.is_set():
            console.print("no cell is left")
    if json is not None:
        write_json({"worker": worker.name, **_progress(ledger)}, json)
    if stop.is_set():
        raise SystemExit(130)


@sweep_app.command()
def status(
    spec: Spec = None,
    storage: Storage = None,
    name: Name = None,
    out: Out = None,
    watch: Annotated[bool, typer.Option(help="Go on showing it until Ctrl-C.")] = False,
    journal: Annotated[bool, typer.Option(help="List every attempt too.")] = False,
    json: JsonOut = None,
) -> None:
    """Show the cells of a sweep, their progress, and the time left.

    rlkl sweep status recipes/sweep_kl.yaml --watch
    """
    with refusing_bad_input():
        check_writable(json, None)
        ledger = _open(spec, storage, name, out)[0]
    from rlkl.sweep.status import status_table

    def table():
        cells = ledger.cells()
        workers = max(1, len({c.worker for c in cells if c.state == "running"}))
        return status_table(cells, ledger.spec, workers, rows=len(cells))

    if json is not None:
        write_json(_progress(ledger), json)
        return
    console = Console()
    if watch:
        with Live(table(), console=console, refresh_per_second=1) as live:
            while True:
                time.sleep(1)
                live.update(table())
    console.print(table())
    if journal:
        for attempt in ledger.attempts():
            console.print(attempt, markup=False, highlight=False)


def _progress(ledger: "Ledger") -> dict[str, Any]:
    """A sweep's cells, attempts, and the seconds that one worker would take for the rest."""
    from rlkl.sweep.status import seconds_left

    cells = ledger.cells(records=False)
    rows = [{k: v for k, v in vars(c).items() if k != "record"} for c in cells]
    left = seconds_left(cells, ledger.spec, 1)
    return {"cells": rows, "attempts": ledger.attempts(), "seconds_left": left}


@sweep_app.command()
def retry(
    spec: Spec = None,
    storage: Storage = None,
    name: Name = None,
    out: Out = None,
    json: JsonOut = None,
) -> None:
    """Queue the failed cells of a sweep again; `run` or `work` then takes them.

    rlkl sweep retry recipes/sweep_kl.yaml
    """
    with refusing_bad_input():
        check_writable(json, None)
        ledger = _open(spec, storage, name, out)[0]
    waiting = ledger.retry()
    if json is not None:
        write_json({"retried": waiting}, json)
    else:
        print(f"{waiting} cells wait again")


@sweep_app.command()
def frontier(
    spec: Spec = None,
    storage: Storage = None,
    name: Name = None,
    out: Out = None,
    json: JsonOut = None,
) -> None:
    """Print the frontier of a sweep: shares, hypervolumes, comparisons at equal KL.

    rlkl sweep frontier recipes/sweep_kl.yaml

    rlkl sweep frontier recipes/sweep_kl.yaml --json -
    """
    console = Console(stderr=json == "-")
    with refusing_bad_input():
        from rlkl.sweep.export import analyse, frontier_json
        from rlkl.sweep.findings import findings
        from rlkl.sweep.records import collect

        check_writable(json, None)
        result = collect(_open(spec, storage, name, out)[0])
    with console.status(f"{len(result.points)} points"):
        analysis = analyse(result)
    if json is not None:
        write_json(frontier_json(analysis), json)
        return
    for line in findings(analysis):
        console.print(f"- {line['text']}", markup=False, highlight=False)


@sweep_app.command()
def report(
    spec: Spec = None,
    storage: Storage = None,
    name: Name = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.")] = None,
    records: Annotated[
        Path | None, typer.Option(help="records.jsonl of an earlier report, in place of a sweep.")
    ] = None,
    wandb: Annotated[bool, typer.Option(help="Log the summary run to W&B.")] = True,
    json: JsonOut = None,
) -> None:
    """Write the page, the figures and all records of a sweep, finished or not.

    rlkl sweep report recipes/sweep_kl.yaml

    rlkl sweep report --storage sqlite:///runs/sweep_kl/sweep.db --out report

    --json has what `frontier --json` has.
    """
    with refusing_bad_input():
        from rlkl.sweep.export import frontier_json

        check_writable(json, None)
        from rlkl.sweep.records import SweepResult, collect

        if records is not None:
            result, folder = SweepResult.load(records), out or Path("report")
            identity = result.name
        else:
            ledger, sweep_folder = _open(spec, storage, name, None)
            result, folder = collect(ledger), out or sweep_folder / "report"
            identity = ledger.identity
    with console_beside(json) as console:
        analysis = _write_report(console, result, folder, identity if wandb else None)
    if json is not None:
        write_json(frontier_json(analysis), json)


def _write_report(
    console: Console, result: "SweepResult", folder: Path, identity: str | None
) -> "Analysis":
    """Writes a report; with an `identity`, its W&B summary run too."""
    from rlkl.sweep.findings import findings
    from rlkl.sweep.report import FILES, write_report

    with refusing_bad_input():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).touch()  # whether it can be written to
    with console.status(f"a report of {len(result.points)} points"):
        analysis = write_report(result, folder)
        if identity is not None:
            from rlkl.sweep.tracking import log_summary

            log_summary(analysis, folder, identity)
    for line in findings(analysis):
        console.print(f"- {line['text']}", markup=False, highlight=False)
    console.print(f"written to {folder}: {', '.join(FILES)}", highlight=False)
    return analysis


def _open(
    spec: Path | None, storage: str | None, name: str | None, out: Path | None
) -> "tuple[Ledger, Path]":
    """The sweep that is meant: by its spec's name, by its folder (also in the spec's place), or
    by its storage; without any of these, the only one in ``runs``.

    A folder remembers the storage of its sweep.

    Raises:
        ValueError: none of them is given, and ``runs`` has several or none.
    """
    from rlkl.sweep.ledger import Ledger
    from rlkl.sweep.storage import Remembered, remembered

    if spec is not None and spec.is_dir():
        spec, out = None, out or spec
    name = name or (_name_in(spec) if spec is not None else None)
    if storage is None and out is None and name is None:
        found = sorted(f for f in Path("runs").glob("*") if remembered(f) is not None)
        if len(found) != 1:
            here = f" (here are {', '.join(map(str, found))})" if found else ""
            raise ValueError(f"which sweep? give its SPEC, --out FOLDER, or --storage URL{here}")
        out = found[0]
    if out is None and name is not None:
        out = Path("runs") / name
    where = None if storage is None else Remembered(storage, name)
    if where is None:
        assert out is not None  # of the name, or found
        where = remembered(out)
    if where is None:
        raise ValueError(
            f"{out} holds no sweep (no sweep.db, and no storage.json that says where it is); "
            "`rlkl sweep run` begins one"
        )
    with where.refused():
        ledger = Ledger(where.storage, name or where.name)
    return ledger, out or Path("runs") / ledger.name


def _name_in(spec: Path) -> str:
    """The name of the sweep of a YAML, which need not be checked again to look at its results."""
    from rlkl.sweep.fields import read_yaml

    if not spec.is_file():
        raise FileNotFoundError(f"no such sweep: {spec}")
    data = read_yaml(spec)
    return str(data.get("name", spec.stem)) if isinstance(data, dict) else spec.stem
