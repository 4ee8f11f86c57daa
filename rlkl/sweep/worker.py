"""A worker: takes cells one after the other and runs each as a process of its own."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import yaml

from rlkl.sweep.algorithms import command_of, in_own_names
from rlkl.sweep.ledger import REFERENCE, Cell, Ledger
from rlkl.sweep.records import check_record
from rlkl.sweep.spec import ALGORITHM, STRENGTH
from rlkl.sweep.study import ConfigurationStudy

LAST_LINES = 15
"""How much of its output a failed cell's note keeps."""


class Worker:
    """Runs the cells of a sweep until none is left or it is told to stop.

    Args:
        ledger: of the sweep.
        folder: where the cells' folders are; each machine has its own.
        threads: CPU threads of a cell.
        recipe: script in place of the one that the spec names, where that is not on this machine.
        stop: set from outside to stop with a checkpoint.
        parent: process id of the driver that started this worker; it stops when the driver is gone.
    """

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        threads: int,
        *,
        recipe: str | None = None,
        stop: threading.Event | None = None,
        parent: int | None = None,
    ) -> None:
        self.ledger, self.spec, self.folder = ledger, ledger.spec, folder.resolve()
        self.threads, self.recipe = threads, recipe or ledger.spec.recipe
        if recipe is not None and ledger.spec.recipe is None:
            raise ValueError(f"{ledger.name} runs rlkl's own algorithms: leave --recipe out")
        self.stop, self.parent = stop or threading.Event(), parent
        self.name = f"{socket.gethostname()}/{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder))
        if self.recipe is not None and not Path(self.recipe).is_file():
            raise FileNotFoundError(
                f"no such recipe here: {self.recipe}; name this machine's copy by --recipe"
            )
        self.study = ConfigurationStudy(ledger)

    def work(self) -> None:
        """Takes and runs cells until all have ended, or until told to stop."""
        while not self._told_to_stop():
            self.study.settle()
            cell = self.ledger.claim(self.name)
            if cell is not None:
                self.run(cell)
                continue
            cells = self.ledger.cells(records=False)
            if all(c.state in ("done", "failed") for c in cells) and self._all_there(cells):
                return
            self.stop.wait(min(1.0, self.spec.heartbeat))

    def _all_there(self, cells: list[Cell]) -> bool:
        self.study.settle()
        return len([c for c in cells if c.configuration >= 0]) >= self.spec.num_cells

    def _told_to_stop(self) -> bool:
        if self.parent is not None and os.getppid() != self.parent:
            self.stop.set()
        return self.stop.is_set()

    def run(self, cell: Cell) -> None:
        """Runs one cell to its end, to its failure, or until told to stop."""
        folder = self.folder / cell.key
        folder.mkdir(parents=True, exist_ok=True)
        with self._folder_to_myself(cell, folder) as lock:
            if lock is None:
                return
            try:
                self._write_plan(cell, folder)
            except ValueError as error:
                self.ledger.fail(cell, str(error))
                return
            code = self._supervise(cell, folder, lock)
        if code is None:  # taken over by another worker
            return
        points = folder / "points.json"
        if code == 0 and points.is_file():
            self._finish(cell, points)
        elif code == 0:
            self.ledger.fail(
                cell, f"the evaluator wrote no {points.name}\n{_tail(folder / 'output.log')}"
            )
        elif self._told_to_stop():
            self.ledger.release(cell)
        else:
            self.ledger.fail(cell, f"exit code {code}\n{_tail(folder / 'output.log')}")

    def _finish(self, cell: Cell, points: Path) -> None:
        """Ends a cell with what was measured, or fails it where that is none."""
        try:
            record = json.loads(points.read_text())
            check_record(record, cell.key == REFERENCE)
        except ValueError as error:
            points.unlink()  # so that another attempt measures again
            self.ledger.fail(cell, str(error))
            return
        self.ledger.finish(cell, record)

    def _supervise(self, cell: Cell, folder: Path, lock: int) -> int | None:
        """Exit code of the cell's process; None where the lease was lost on the way."""
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with (folder / "output.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlkl.sweep.cell", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=[lock],
            )
        (folder / "process").write_text(f"{socket.gethostname()} {process.pid}")
        try:
            interrupted, beat = False, 0.0
            while process.poll() is None:
                if time.monotonic() - beat > self.spec.heartbeat:
                    beat = time.monotonic()
                    if not self.ledger.heartbeat(cell, progress_of(folder, cell)):
                        return None
                if self._told_to_stop() and not interrupted:
                    process.send_signal(signal.SIGINT)
                    interrupted = True
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(0.1, self.spec.heartbeat))
            return process.returncode
        finally:
            _kill_group(process.pid)  # whatever the cell has left behind
            process.wait()

    @contextmanager
    def _folder_to_myself(self, cell: Cell, folder: Path) -> Iterator[int | None]:
        """The lock on a cell's folder, which every process of the cell holds open.

        Where the processes of an earlier attempt on this machine live on without their worker, they
        have until the end of their patience, then they are killed; those of another machine, where
        the folder is shared after all, are waited for. None where the lease was lost meanwhile.
        """
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            waited = time.monotonic()
            while not _locked(lock):
                if not self.ledger.heartbeat(cell, cell.progress):
                    yield None
                    return
                if time.monotonic() - waited > self.spec.grace:
                    _kill_group_of(folder / "process")
                time.sleep(min(0.2, self.spec.heartbeat))
            yield lock
        finally:
            os.close(lock)

    def _write_plan(self, cell: Cell, folder: Path) -> None:
        """What the cell's process reads; refuses a folder that another sweep has left."""
        evaluation = self.spec.evaluation
        command = None if cell.key == REFERENCE else self.command(cell)
        plan = {
            "sweep": self.ledger.identity,
            "key": cell.key,
            "recipe": None if command is None else self.recipe or f"rlkl {command[-1]}",
            "command": command,
            "settings": cell.settings,
            "evaluator": evaluation.script,
            "evaluation": {
                "prompts": evaluation.prompts,
                "responses_per_prompt": evaluation.responses_per_prompt,
                "reference_samples": evaluation.reference_samples,
                "seed": evaluation.seed,
                "checkpoints": evaluation.checkpoints,
                "samples": evaluation.samples,
            },
        }
        file = folder / "cell.json"
        if file.is_file() and json.loads(file.read_text())["sweep"] != self.ledger.identity:
            raise ValueError(
                f"{folder} belongs to another sweep; delete it, or choose another --out"
            )
        settings = self.settings(cell, folder)
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan, indent=2))
        temporary.replace(file)

    def command(self, cell: Cell) -> list[str]:
        """What trains a cell, as words for Python."""
        if self.recipe is not None:
            return [self.recipe]
        return command_of(cell.settings[ALGORITHM])

    def settings(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """The recipe's settings of a cell, by its own names."""
        settings = {**cell.settings, "output_dir": str(folder / "run"), "seed": cell.seed}
        if self.spec.evaluation.checkpoints:
            settings |= {"keep_checkpoints": True, "save_total_limit": None}
        if "report_to" in cell.settings:  # a recipe that can log to W&B
            tags = [f"{k}={cell.settings[k]}" for k in (STRENGTH,) if k in cell.settings]
            own = cell.settings.get("wandb_tags") or []
            own = [own] if isinstance(own, str) else own
            settings |= {
                "wandb_group": self.spec.name,
                "wandb_run_id": wandb_id(self.ledger.identity, cell.key),
                "run_name": f"{cell.label} seed={cell.seed}",
                "wandb_tags": [*own, cell.arm, *tags, f"seed={cell.seed}"],
                "wandb_arm": cell.arm,
            }
        algorithm = self.spec.algorithm_of(cell.settings)
        return settings if algorithm is None else in_own_names(algorithm, settings)


def wandb_id(identity: str, key: str) -> str:
    """The W&B id of a cell: the same in every attempt, on every machine."""
    return hashlib.sha256(f"{identity}/{key}".encode()).hexdigest()[:12]


def progress_of(folder: Path, cell: Cell) -> float:
    """Share of its steps that a run has logged, or of its samples that the reference has drawn; 0
    where ``max_steps`` or the log does not say.
    """
    if cell.key == REFERENCE:
        try:
            return float((folder / "progress").read_text())
        except (FileNotFoundError, ValueError):  # not begun, or just being written
            return 0.0
    steps, file = cell.settings.get("max_steps"), folder / "run" / "metrics.jsonl"
    if not isinstance(steps, int) or steps <= 0 or not file.is_file():
        return 0.0
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 65536))
        whole = [line for line in lines.read().split(b"\n")[:-1] if line.startswith(b"{")]
    try:
        return min(1.0, float(json.loads(whole[-1])["step"]) / steps)
    except (IndexError, KeyError, TypeError, ValueError):  # no line yet, or another kind of log
        return 0.0


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _kill_group_of(file: Path) -> None:
    """Kills the processes that a file names, if they are this machine's."""
    host, _, process = file.read_text().rpartition(" ") if file.is_file() else ("", "", "")
    if host == socket.gethostname():  # the same number is another process on another machine
        _kill_group(int(process))


def _kill_group(process: int) -> None:
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def threads_for(workers: int) -> int:
    """CPU threads of each of so many workers on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)


def main() -> None:
    """Entry point of a worker that a driver has started: it is told what to do on standard input.

    That is one JSON object; the storage's address in it may have a password.
    """
    given = json.load(sys.stdin)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ledger = Ledger(given["storage"], given["name"])
    Worker(
        ledger,
        Path(given["out"]),
        given["threads"],
        recipe=cast("str | None", given["recipe"]),
        stop=stop,
        parent=given["parent"],
    ).work()


if __name__ == "__main__":
    main()
