"""`rlkl audit` as its users type it."""

import json

import pytest

from rlkl.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; gives exit code, standard output and standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["rlkl", "audit", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


SMALL = ("--vocab", 3, "--length", 2)


def test_the_table_has_every_estimator_and_library(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = run(*SMALL)
    assert (code, err) == (0, "")
    for name in ("topk_bucket", "mcv_positions", "TRL RLOO", "verl, KL loss k3+", "KL-RB code"):
        assert name in out


def test_json_alone_is_on_standard_output_with_the_documented_keys(run):
    code, out, _ = run(*SMALL, "--seed", 3, "--eos", -1, "--json", "-")
    record = json.loads(out)
    assert code == 0
    assert record["responses"] == 9
    assert record["exact_kl"] > 0
    assert {"estimator", "placement", "sampling", "value_bias", "value_var"} <= set(
        record["rows"][0]
    )


def test_files_are_written_where_asked(run, tmp_path):
    page, data = tmp_path / "audit.html", tmp_path / "audit.json"
    code, out, _ = run(*SMALL, "--html", page, "--json", data)
    assert code == 0
    assert str(page) in out
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(data.read_text())["vocab"] == 3


def test_models_of_the_users_own(run, tmp_path):
    file = tmp_path / "models.json"
    models = {"length": 1, "policy": [[0.0, 0.0]], "ref": [[0.0, 1.0]], "eos": None}
    file.write_text(json.dumps(models), encoding="utf-8-sig")
    code, out, _ = run("--models", file, "--json", "-")
    assert code == 0
    assert json.loads(out)["responses"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab", "20", "--length", "9"], "use a smaller vocab or length"),
        (["--vocab", "2000", "--length", "1"], "use a smaller vocab or length"),
        (["--length", "1000000000000"], "use a smaller vocab or length"),
        (["--drift", "nan"], "drift is nan"),
        (["--drift=-inf"], "drift is -inf"),
        (["--drift", "1e300"], "use a smaller drift"),
        (["--drift=-100"], "sampler gives a response the probability 10^-"),
        (["--truncate-at", "nan"], "truncate_at is nan"),
        (["--vocab", "x"], "--vocab"),
        (["--truncate-at", "0.1"], "truncate_at is 0.1"),
        (["--top-k", "0"], "k is 0"),
        (["--eos", "7"], "eos is 7"),
        (["--models", "none.json"], "cannot use 'none.json': No such file or directory; name"),
        (["--models", "."], "cannot use '.': Is a directory; name another file"),
        (["--html", "no/such/folder.html"], "there is no folder"),
        (["--html", "."], "it is a folder"),
        (["--html", "-"], "give the file"),
        (["--json", "."], "it is a folder"),
        (["--json", "a", "--html", "a"], "--json and --html are both 'a'"),
        (["--models", "a.json", "--eos", "0"], "--eos is of random models, and has no meaning"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_without_permission_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, err = run(*SMALL, "--html", tmp_path / "page.html")
    assert code == 2
    assert "page.html': no permission to" in err


def test_help_has_an_example(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "rlkl audit --vocab 5" in out
