"""One cell: the process that runs a recipe to its end and then measures it.

    python -m rlkl.sweep.cell FOLDER

FOLDER holds ``cell.json`` (what to run, and the cell's settings by the sweep's names) and
``settings.yaml`` (the same, for the recipe). What is asked of a recipe, a script of any kind:

- ``python RECIPE --config settings.yaml`` trains, writing below the ``output_dir`` named there;
- the same command again goes on from the last checkpoint of a run that was stopped or killed;
- SIGINT makes it write a checkpoint and end with a code that is not 0; code 0 means finished;
- it declares ``SETTINGS``, the dataclasses of its settings, so that a sweep can be checked before
  it starts; a finished run leaves ``policy/`` (and ``checkpoint-N/`` if told to keep them) for the
  evaluator, and ``metrics.jsonl`` with a ``step`` in every line tells how far it is.

rlkl's own commands do all that (`rlkl.sweep.algorithms`): ``rlkl rloo --config settings.yaml``.

And of an evaluator: ``python EVALUATOR FOLDER`` writes ``points.json`` there, all at once (see
`rlkl.sweep.evaluator` for its keys).

A cell that finds ``points.json`` is done, one that finds ``trained`` only measures: a process that
is killed at any moment costs at most the steps since a checkpoint. It ends when the worker that
started it is gone, and passes SIGINT on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL = 0.2
PATIENCE = 60.0
"""Seconds that a recipe has for its checkpoint once its worker is gone."""


class Supervisor:
    """Runs programs one after the other, until the worker that started this process is gone."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.child: subprocess.Popen[bytes] | None = None
        self.stopping = False
        signal.signal(signal.SIGINT, self._pass_on)

    def _pass_on(self, number: int, frame: object) -> None:
        self.stopping = True
        if self.child is not None:
            self.child.send_signal(signal.SIGINT)

    def run(self, command: list[str]) -> None:
        """Runs a command to its end.

        Raises:
            SystemExit: it failed (its code), or this process is to stop (130).
        """
        if self.stopping:
            raise SystemExit(130)
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deserted: float | None = None
        while (code := self.child.poll()) is None:
            time.sleep(POLL)
            if deserted is None and os.getppid() != self.parent:
                deserted = time.monotonic()
                self._pass_on(signal.SIGINT, None)
            if deserted is not None and time.monotonic() - deserted > PATIENCE:
                self.child.kill()
        self.child = None
        if self.stopping:
            raise SystemExit(130)
        if code != 0:
            raise SystemExit(code if code > 0 else 128 - code)


def main() -> None:
    """Trains, measures, and leaves ``points.json``."""
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "cell.json").read_text())
    supervisor = Supervisor()
    if (folder / "points.json").is_file():
        return
    trained = folder / "trained"
    if plan["command"] is not None and not trained.is_file():
        settings = str(folder / "settings.yaml")
        supervisor.run([sys.executable, *plan["command"], "--config", settings])
        trained.touch()
    evaluator = [plan["evaluator"]] if plan["evaluator"] else ["-m", "rlkl.sweep.evaluator"]
    supervisor.run([sys.executable, *evaluator, str(folder)])


if __name__ == "__main__":
    main()
