"""What a worker reads off a cell's folder, and whom it may kill."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlkl.sweep.ledger import open_ledger
from rlkl.sweep.spec import EvaluationSpec
from rlkl.sweep.worker import Worker, _kill_group_of, progress_of


@pytest.mark.parametrize(("max_steps", "share"), [(4, 0.5), (-1, 0.0), (None, 0.0)], ids=str)
def test_progress_is_the_share_of_the_steps_where_they_are_known(
    make_spec, tmp_path, max_steps, share
):
    spec = make_spec(settings={"max_steps": max_steps}, grid={"kl_coef": [0.1]}, seeds=[0])
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", spec, "identity")
    ledger.add_configuration(spec.configuration(0), 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3, "lo')
    assert progress_of(tmp_path, ledger.claim("worker")) == share


@pytest.mark.parametrize(
    "log", ["", '{"step": "x"}\n', '{"loss": 1}\n', "{not json\n", '{"step": null}\n'], ids=str
)
def test_a_log_of_another_kind_is_no_progress_and_no_error(make_spec, tmp_path, log):
    spec = make_spec(grid={"kl_coef": [0.1]}, seeds=[0])
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", spec, "identity")
    ledger.add_configuration(spec.configuration(0), 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(log)
    assert progress_of(tmp_path, ledger.claim("worker")) == 0.0


@pytest.mark.parametrize(("written", "share"), [(None, 0.0), ("", 0.0), ("0.25", 0.25)], ids=str)
def test_the_references_progress_is_what_it_says(make_spec, tmp_path, written, share):
    spec = make_spec(grid={"kl_coef": [0.1]}, seeds=[0])
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", spec, "identity")
    ledger.add_reference()
    if written is not None:
        (tmp_path / "progress").write_text(written)
    assert progress_of(tmp_path, ledger.claim("worker")) == share


def test_an_evaluator_that_writes_nothing_is_quoted(make_spec, tmp_path):
    script = tmp_path / "evaluator.py"
    script.write_text("print('measured nothing')")
    evaluation = EvaluationSpec(script=str(script), reference_samples=0)
    spec = make_spec(grid={"kl_coef": [0.1]}, seeds=[0], retries=0, evaluation=evaluation)
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", spec, "identity")
    ledger.add_configuration(spec.configuration(0), 0)
    Worker(ledger, tmp_path / "out", threads=1).run(ledger.claim("worker"))
    (cell,) = ledger.cells()
    assert cell.state == "failed"
    assert cell.error == "the evaluator wrote no points.json\nmeasured nothing"


@pytest.mark.parametrize("host", [socket.gethostname(), "another.machine", None])
def test_only_this_machines_processes_are_killed(tmp_path: Path, host):
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(sleeping, start_new_session=True)
    file = tmp_path / "process"
    file.write_text("" if host is None else f"{host} {process.pid}")
    _kill_group_of(file)
    try:
        if host == socket.gethostname():
            assert process.wait(timeout=30) == -9
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
    finally:
        process.kill()
        process.wait()
    _kill_group_of(tmp_path / "none")
