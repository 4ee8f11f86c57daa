"""Runs a sweep whose spec is stored as JSON, without reading and checking its YAML again."""

import sys
from pathlib import Path

from rlkl.sweep.driver import Driver, begin_sweep
from rlkl.sweep.spec import SweepSpec
from rlkl.sweep.storage import default_storage


def main() -> None:
    spec, out = SweepSpec.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ledger = begin_sweep(spec, default_storage(out), out)
    Driver(ledger, out, workers=2).run(lambda: None, seconds_between=0.1)


if __name__ == "__main__":
    main()
