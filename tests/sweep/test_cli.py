"""`rlkl sweep` as people use it: plans, nonsense, looking at a sweep, reporting it."""

import json
from pathlib import Path

import pytest

from rlkl.cli.main import main
from rlkl.sweep.driver import begin_sweep
from rlkl.sweep.ledger import open_ledger
from rlkl.sweep.spec_file import load_spec
from rlkl.sweep.storage import default_storage

RECORDS = Path(__file__).parents[2] / "notebooks" / "sweep_kl.jsonl"
RECORD = {
    "kl_se": 0.1,
    "reward_se": 0.1,
    "step": 4,
}


def run(monkeypatch: pytest.MonkeyPatch, *words: str, columns: int = 140) -> int:
    monkeypatch.setattr("sys.argv", ["rlkl", "sweep", *words])
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def finished(write_spec, tmp_path) -> Path:
    """The folder of a sweep whose cells are done, but for one that failed."""
    script = str(Path(__file__).parent / "fake_evaluator.py")
    spec = load_spec(write_spec(evaluation={"script": script, "reference_samples": 0}))
    out = tmp_path / "out"
    ledger = begin_sweep(spec, default_storage(out), out)
    while (cell := ledger.claim("worker")) is not None:
        if cell.key == "003-seed1":
            ledger.fail(cell, "exit code 3\nno memory")
            continue
        kl = 1 / cell.settings["kl_coef"] + 0.01 * cell.seed
        point = RECORD | {"kl": kl, "reward": kl**0.5}
        ledger.finish(cell, {"points": [point], "samples": []})
    return out


def test_a_dry_run_lists_the_cells_and_the_time_and_writes_nothing(
    write_spec, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    spec = str(write_spec(minutes_per_cell=3))
    assert run(monkeypatch, "run", spec, "--dry-run", "--workers", "2") == 0
    said = capsys.readouterr().out
    assert "003-seed1  rb kl_coef=1" in said
    assert "8 cells with 2 worker(s): 12 min" in said
    assert {file.name for file in tmp_path.iterdir()} == {"fake.yaml"}


def test_a_reference_that_failed_is_not_passed_over(write_spec, tmp_path, monkeypatch, capsys):
    failing = tmp_path / "evaluator.py"
    fake = Path(__file__).parent / "fake_evaluator.py"
    failing.write_text(fake.read_text().replace('{"reward": 0.0}', "None"))
    spec = write_spec(
        grid={"kl_coef": [1.0]},
        seeds=[0],
        retries=0,
        settings={"max_steps": 1},
        evaluation={"script": str(failing), "reference_samples": 8},
    )
    words = ["run", str(spec), "--out", str(tmp_path / "out"), "--no-report", "--json", "-"]
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert "the evaluator wrote no reference" in said.err
    assert [cell["state"] for cell in json.loads(said.out)["cells"]].count("failed") == 1
    assert "1 cells failed" in said.err


def test_a_dry_run_of_a_search_says_what_is_searched(write_spec, tmp_path, monkeypatch, capsys):
    search = {"configurations": 6, "kl_coef": {"low": 0.01, "high": 1.0, "log": True}}
    spec = str(write_spec(search=search, grid={"kl_estimator": ["k1", "rb"]}))
    assert run(monkeypatch, "run", spec, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "6 configurations chosen by tpe" in said
    assert "12 cells with 1 worker(s): unknown until the first cell has ended" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.yaml"], "no such sweep"),
        (["run", "bad.yaml"], "did you mean kl_coef?"),
        (["run", "bad.yaml", "--workers", "0"], "--workers"),
        (["status"], "which sweep?"),
        (["status", "none.yaml"], "no such sweep"),
        (["status", "--out", "nowhere"], "holds no sweep"),
        (["frontier", "--storage", "sqlite:///empty.db"], "sqlite:///empty.db holds no sweep"),
        (["status", "--storage", "sqlite:///text.db"], "cannot open sqlite:///text.db: file is no"),
        (["report", "--storage", "nonsense"], "nonsense"),
        (["work", "--storage", "sqlite:///empty.db", "--name", "x"], "holds no sweep 'x'"),
        (["retry"], "which sweep?"),
        (["report", "--records", "none.jsonl"], "cannot use 'none.jsonl': No such file"),
        (["report", "--records", "head.jsonl"], "no points: none of its runs was done. Go on with"),
        (["report", "--records", str(RECORDS), "--out", "bad.yaml/report"], "bad.yaml"),
        (["wander"], "wander"),
        (["work", "--storage", "sqlite:///begun.db", "--out", "bad.yaml/x"], "bad.yaml/x"),
        (["frontier", "--storage", "sqlite:///begun.db", "--json", "none/x"], "there is no folder"),
        (["status", "--storage", "sqlite:///begun.db", "--json", "none/x"], "there is no folder"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(
    write_spec, make_spec, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    open_ledger("sqlite:///begun.db", make_spec(), "identity")
    write_spec(grid={"kl_coeff": [0.1]}).rename(tmp_path / "bad.yaml")
    Path("text.db").write_text("no database " * 200)
    Path("head.jsonl").write_text(RECORDS.read_text().split("\n")[0])
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("command", ["run", "work", "status", "retry", "frontier", "report"])
def test_the_help_shows_examples_and_no_escapes(monkeypatch, capsys, command):
    assert run(monkeypatch, command, "--help") == 0
    said = capsys.readouterr().out
    assert f" rlkl sweep {command}" in said
    assert "\\b" not in said


def test_status_fits_a_terminal_of_80_columns_and_takes_the_folder(finished, monkeypatch, capsys):
    assert run(monkeypatch, "status", str(finished), columns=80) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert "000-seed0" in said
    assert "failed" in said


def test_status_shows_states_notes_and_the_journal(finished, monkeypatch, capsys):
    assert run(monkeypatch, "status", "--out", str(finished), "--journal") == 0
    said = capsys.readouterr().out
    assert "7 done" in said
    assert "no memory" in said
    assert "'outcome': 'done'" in said
    assert run(monkeypatch, "status", "--out", str(finished), "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["cells"]) == 8
    assert record["seconds_left"] is not None


def test_retry_queues_the_failed_again(finished, monkeypatch, capsys):
    assert run(monkeypatch, "retry", "--out", str(finished)) == 0
    assert capsys.readouterr().out == "1 cells wait again\n"
    assert run(monkeypatch, "retry", "--out", str(finished), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == {"retried": 0}


def test_the_only_sweep_in_runs_needs_no_name(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    finished.rename(tmp_path / "runs" / "one")
    assert run(monkeypatch, "status") == 0
    assert "7 done" in capsys.readouterr().out
    (tmp_path / "runs" / "two").mkdir()
    (tmp_path / "runs" / "two" / "sweep.db").touch()
    assert run(monkeypatch, "frontier", "--json", "-") == 2
    assert "(here are runs/one, runs/two)" in capsys.readouterr().err


def test_frontier_prints_sentences_or_the_json(finished, monkeypatch, capsys):
    assert run(monkeypatch, "frontier", "--out", str(finished)) == 0
    assert "Share of the reward-vs-KL front" in capsys.readouterr().out
    assert run(monkeypatch, "frontier", "--out", str(finished), "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["share_on_front"]) == {"k1", "rb"}
    assert len(record["points"]) == 7


def test_report_writes_the_page_from_a_storage_or_from_stored_records(
    finished, tmp_path, monkeypatch, capsys
):
    one, two = tmp_path / "one", tmp_path / "two"
    storage = default_storage(finished)
    assert run(monkeypatch, "report", "--storage", storage, "--out", str(one), "--no-wandb") == 0
    assert "written to" in capsys.readouterr().out
    records = str(one / "records.jsonl")
    words = ["report", "--records", records, "--out", str(two), "--no-wandb", "--json", "-"]
    assert run(monkeypatch, *words) == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 7
    assert (two / "index.html").read_text()[:15] == "<!doctype html>"
