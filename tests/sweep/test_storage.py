"""Where a sweep is stored: its folder remembers the address, and nobody the password."""

import json
import shutil
from pathlib import Path

import pytest

from rlkl.cli.main import main
from rlkl.sweep.driver import Driver, begin_sweep
from rlkl.sweep.ledger import Ledger
from rlkl.sweep.spec_file import load_spec
from rlkl.sweep.storage import REMEMBERED, default_storage, remember, remembered, shown

SECRET = "correct-horse"


def sweep(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["rlkl", "sweep", *words])
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def said(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_the_folder_of_a_sweep_remembers_a_storage_elsewhere(
    write_spec, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    one = {"grid": {"kl_coef": [1.0]}, "seeds": [0], "settings": {"max_steps": 1}}
    evaluation = {"script": str(Path(__file__).parent / "fake_evaluator.py")}
    spec = str(write_spec(**one, evaluation=evaluation | {"reference_samples": 0}))
    words = ["run", spec, "--no-report"]
    assert sweep(monkeypatch, *words, "--storage", "sqlite:///other.db") == 0
    assert "sqlite:///other.db" in capsys.readouterr().out
    assert not Path("runs/fake/sweep.db").exists()
    monkeypatch.chdir(tmp_path / "runs")  # whose relative path it was
    for where in ([spec, "--out", "fake"], ["--out", "fake"], ["fake"]):
        assert sweep(monkeypatch, "status", *where, "--json", "-") == 0
        assert [cell["state"] for cell in said(capsys)["cells"]] == ["done"]
    monkeypatch.chdir(tmp_path)
    assert sweep(monkeypatch, "status", "--json", "-") == 0  # the only one in runs
    assert len(said(capsys)["cells"]) == 1
    assert sweep(monkeypatch, *words, "--json", "-") == 0  # goes on where it was
    assert len(said(capsys)["attempts"]) == 1
    Path("runs/fake", REMEMBERED).write_text("no json")
    assert sweep(monkeypatch, "status", "runs/fake") == 2
    assert "delete it and give --storage" in capsys.readouterr().err


def test_the_folders_own_database_is_not_remembered_and_may_be_moved(make_spec, tmp_path):
    folder = tmp_path / "out"
    remember(folder, "sqlite:///elsewhere.db", "fake")
    assert remembered(folder).storage != default_storage(folder)
    begin_sweep(make_spec(), default_storage(folder), folder)
    folder.rename(tmp_path / "moved")
    assert remembered(tmp_path / "moved").storage == default_storage(tmp_path / "moved")
    assert remembered(tmp_path) is None


def test_a_password_is_in_no_file_no_command_and_no_message(
    make_spec, postgres_url, tmp_path, monkeypatch, capsys
):
    """The tests' server lets everybody in; what it would be told is all the same here."""
    url = postgres_url.replace("rlkl@", f"rlkl:{SECRET}@") + f"&sslpassword={SECRET}"
    spec = make_spec(name="secret", grid={"kl_coef": [1.0]}, seeds=[0])
    ledger = begin_sweep(spec, url, tmp_path)
    driver = Driver(ledger, tmp_path, workers=1)
    words = driver.workers[0].args
    driver.run(lambda: None, seconds_between=0.1)
    assert [cell.state for cell in ledger.cells()] == ["done"]
    assert SECRET not in str(words)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert sweep(monkeypatch, "status", "--out", str(tmp_path), "--json", "-") == 0
    assert len(said(capsys)["cells"]) == 1
    with pytest.raises(ValueError, match="holds no sweep 'none'") as error:
        Ledger(url, "none")
    assert SECRET not in str(error.value)
    assert shown("no address") == "no address"


@pytest.mark.parametrize("command", ["status", "run"])
def test_a_server_that_wants_the_password_says_what_to_set(
    write_spec, tmp_path, monkeypatch, capsys, command
):
    nobody = f"postgresql://me:{SECRET}@localhost:1/sweeps?connect_timeout=2"
    remember(tmp_path, nobody, "fake")
    spec = write_spec(grid={"kl_coef": [1.0]})
    assert sweep(monkeypatch, command, str(spec), "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot open postgresql+psycopg://me@localhost:1/sweeps")
    assert "set PGPASSWORD, or give --storage again" in error
    assert error.count("\n") == 1


def test_a_sweep_is_run_again_by_what_its_folder_and_its_report_hold(
    write_spec, tmp_path, monkeypatch
):
    search = {"configurations": 2, "sampler": "random", "kl_coef": {"low": 0.1, "high": 1.0}}
    file = write_spec(search=search, grid={"kl_estimator": ["rb"]}, seeds=[0])
    out = tmp_path / "out"
    assert sweep(monkeypatch, "run", str(file), "--out", str(out)) == 0
    spec = load_spec(file)
    assert load_spec(out / "sweep.yaml") == spec
    for name in (spec.recipe, spec.evaluation.script):
        shutil.copy(name, out / "report")
    again = load_spec(out / "report" / "spec.yaml")
    assert again.search == spec.search
    assert again.settings == spec.settings
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sweep.yaml").write_text("# mine")
    begin_sweep(spec, default_storage(tmp_path / "own"), tmp_path / "own")
    assert (tmp_path / "own" / "sweep.yaml").read_text() == "# mine"


def test_work_says_as_json_what_became_of_the_cells(make_spec, tmp_path, monkeypatch, capsys):
    storage = f"sqlite:///{tmp_path}/all.db"
    spec = make_spec(grid={"kl_coef": [1.0]}, seeds=[0])
    begin_sweep(spec, storage, tmp_path / "begun")
    out, target = str(tmp_path / "out"), str(tmp_path / "end.json")
    words = ["work", "--storage", storage, "--out", out]
    assert sweep(monkeypatch, *words, "--json", "none/x") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert sweep(monkeypatch, *words, "--json", "-") == 0
    record = said(capsys)  # and nothing else on standard output
    assert [cell["state"] for cell in record["cells"]] == ["done"]
    assert [attempt["worker"] for attempt in record["attempts"]] == [record["worker"]]
    assert sweep(monkeypatch, *words, "--json", target) == 0
    assert json.loads(Path(target).read_text())["seconds_left"] == 0
    assert "no cell is left" in capsys.readouterr().out
    assert sweep(monkeypatch, "status", out, "--json", "-") == 0  # the worker's folder knows too
    assert len(said(capsys)["cells"]) == 1
