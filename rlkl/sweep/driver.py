"""Runs a sweep on this machine: begins it, keeps workers alive, stops them with checkpoints."""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from rlkl.sweep.ledger import Ledger, open_ledger, sweep_names
from rlkl.sweep.spec import SweepSpec
from rlkl.sweep.spec_file import spec_yaml
from rlkl.sweep.storage import engine_of, remember
from rlkl.sweep.study import ConfigurationStudy
from rlkl.sweep.worker import threads_for

RESTARTS = 100
"""How often workers that were killed are replaced."""


def default_folder(spec: SweepSpec) -> Path:
    """Where a sweep's files go unless said otherwise."""
    return Path("runs") / spec.name


def begin_sweep(spec: SweepSpec, storage: str, folder: Path) -> Ledger:
    """Opens the sweep in the storage and puts its cells there, as far as they are known.

    The folder gets the whole spec (``sweep.yaml``, to be run again), and remembers the storage.

    Raises:
        ValueError: the folder holds the cells of another sweep, or the storage another spec.
    """
    owners = {p.parent: json.loads(p.read_text())["sweep"] for p in folder.glob("*/cell.json")}
    stored = spec.name in sweep_names(engine_of(storage))
    identity = Ledger(storage, spec.name).identity if stored else secrets.token_hex(8)
    for cell, owner in owners.items():  # before anything is written
        if owner != identity:
            raise ValueError(
                f"{cell} belongs to another sweep: choose another --out, or delete {folder}"
            )
    ledger = open_ledger(storage, spec, identity)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sweep.yaml").exists():  # it may be the user's own
        (folder / "sweep.yaml").write_text(spec_yaml(asdict(spec)), encoding="utf-8")
    remember(folder, storage, spec.name)
    if spec.evaluation.reference_samples > 0:
        ledger.add_reference()
    ConfigurationStudy(ledger).settle()
    return ledger


class Driver:
    """Workers on this machine, as processes that end when this one does.

    Args:
        ledger: of the sweep.
        folder: where the cells' folders and the workers' logs go.
        workers: how many.
        threads: CPU threads of each; None divides this machine's among them.
        recipe: script in place of the one that the spec names.
    """

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        workers: int,
        threads: int | None = None,
        recipe: str | None = None,
    ) -> None:
        self.ledger, self.folder = ledger, folder
        self.command = {
            "storage": ledger.url,
            "name": ledger.name,
            "out": str(folder.resolve()),
            "threads": threads or threads_for(workers),
            "recipe": recipe,
            "parent": os.getpid(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.workers = {number: self._start(number) for number in range(workers)}
        self.restarts = 0

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        with (self.folder / f"worker-{number}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "rlkl.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert worker.stdin is not None
        with suppress(BrokenPipeError), worker.stdin:  # not as words, which every user can list
            worker.stdin.write(json.dumps(self.command).encode())
        return worker

    def run(self, on_tick: Callable[[], None], seconds_between: float = 1.0) -> None:
        """Waits until every cell has ended; a worker that was killed is replaced.

        On Ctrl-C the workers stop with a checkpoint before KeyboardInterrupt goes on upwards.

        Raises:
            RuntimeError: a worker failed by itself: a fault of this program or of the storage.
        """
        try:
            while self.workers:
                with _ctrl_c_afterwards():
                    on_tick()
                time.sleep(seconds_between)
                for number, worker in list(self.workers.items()):
                    code = worker.poll()
                    if code == 0:
                        del self.workers[number]
                    elif code is not None:
                        self._replace(number, code)
        finally:
            self.stop()
        on_tick()

    def _replace(self, number: int, code: int) -> None:
        self.restarts += 1
        if code > 0 or self.restarts > RESTARTS:
            log = self.folder / f"worker-{number}.log"
            error = last_error(log.read_text(errors="replace"))
            raise RuntimeError(f"worker {number} ended with code {code}: {error} (see {log})")
        self.workers[number] = self._start(number)

    def stop(self) -> None:
        """Tells the workers to stop and waits until their cells have written their checkpoints."""
        for worker in self.workers.values():
            if worker.poll() is None:
                worker.send_signal(signal.SIGINT)
        for worker in self.workers.values():
            worker.wait()


@contextmanager
def _ctrl_c_afterwards() -> Iterator[None]:
    """A Ctrl-C in the block is raised at its end: within a library it may come up in a finaliser,
    where Python drops it, and the sweep would go on.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone hears it
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if heard:
        signal.raise_signal(heard[0])


def last_error(log: str) -> str:
    r"""What ended a program, by its log: the message of the last traceback, else the last line.

    >>> log = "Traceback (most recent call last):\n  File ...\nOperationalError: disk is full\n"
    >>> last_error(log + "(Background on this error at: https://sqlalche.me)")
    'OperationalError: disk is full'
    """
    _, traceback, trace = log.rpartition("Traceback (most recent call last):")
    if not traceback:
        return "".join(log.strip().splitlines()[-1:])
    return next((line for line in trace.splitlines() if line and not line.startswith(" ")), "")
