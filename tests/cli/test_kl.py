"""`rlkl kl` as its users type it: numbers, files, interruptions, nonsense."""

import json
import signal
import sys

import pytest

from rlkl.cli.main import main


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlkl", "kl", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


@pytest.fixture
def models(tmp_path, make_lm, tokenizer) -> list[str]:
    """--policy and --ref of two tiny models, and small settings."""
    words = []
    for name, seed in (("policy", 0), ("ref", 1)):
        make_lm(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        words += [f"--{name}", str(tmp_path / name)]
    return [*words, "--max-new-tokens", "4"]


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("the film\nit was\nI found this plot\n")
    return str(path)


def test_json_has_the_documented_keys_and_nothing_else_on_standard_output(
    monkeypatch, capsys, models, prompts
):
    words = [*models, "--prompts", prompts, "--num-samples", "12", "--json", "-"]
    assert run(monkeypatch, *words) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert {"estimators", "negative_fraction", "ess", "truncated_fraction", "tokens"} <= set(record)
    assert {"k1", "k3", "rb", "topk", "cv", "mcv"} <= set(record["estimators"])
    for estimate in record["estimators"].values():
        assert {"nats_per_response", "stderr", "ci95", "nats_per_token", "n"} <= set(estimate)
        assert estimate["n"] == 12
    assert record["negative_fraction"]["rb"] == 0
    assert record["ess"] == 12
    assert "D_KL(" in err


def test_both_directions_are_those_of_either_order(monkeypatch, tmp_path, models, prompts):
    file = tmp_path / "kl.json"
    shared = ["--prompts", prompts, "--num-samples", "6", "--json", str(file)]
    assert run(monkeypatch, *models, *shared, "--both") == 0
    both = json.loads(file.read_text())
    swapped = ["--policy", models[3], "--ref", models[1], *models[4:]]
    assert run(monkeypatch, *swapped, *shared) == 0
    alone = json.loads(file.read_text())
    assert both["reverse"]["estimators"] == alone["estimators"]
    assert both["estimators"] != alone["estimators"]


def test_the_page_stands_alone(monkeypatch, tmp_path, models, prompts):
    page = tmp_path / "kl.html"
    words = [*models, "--prompts", prompts, "--num-samples", "6", "--both", "--html", str(page)]
    assert run(monkeypatch, *words) == 0
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "<script" not in text
    links = [part.split('"')[0] for part in text.split('href="')[1:]]
    assert all(link.startswith("#") for link in links)
    assert "src=" not in text
    assert "the film" in text


def test_text_in_prompts_cannot_break_the_page(monkeypatch, tmp_path, models):
    prompts = tmp_path / "p.txt"
    prompts.write_text("<script>alert(1)</script> [red]the film[/red]\n")
    page = tmp_path / "kl.html"
    words = [*models, "--prompts", str(prompts), "--num-samples", "4", "--html", str(page)]
    assert run(monkeypatch, *words) == 0
    assert "<script>" not in page.read_text()


def test_ctrl_c_reports_what_there_is(monkeypatch, tmp_path, capsys, models, prompts):
    from rlkl.evaluation.kl_estimate import KLEstimation

    step = KLEstimation.step

    def interrupted_step(self):
        step(self)
        if self.n == 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(KLEstimation, "step", interrupted_step)
    file = tmp_path / "kl.json"
    words = [*models, "--prompts", prompts, "--num-samples", "400", "--batch-size", "4"]
    assert run(monkeypatch, *words, "--json", str(file)) == 130
    record = json.loads(file.read_text())
    assert record["n"] == 8
    assert record["interrupted"]
    assert "Interrupted" in capsys.readouterr().out


def test_a_second_ctrl_c_drops_the_batch_in_work(monkeypatch, tmp_path, models, prompts):
    from rlkl.evaluation.kl_estimate import KLEstimation

    step = KLEstimation.step

    def interrupted_step(self):
        if self.n == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        step(self)

    monkeypatch.setattr(KLEstimation, "step", interrupted_step)
    file = tmp_path / "kl.json"
    words = [*models, "--prompts", prompts, "--num-samples", "400", "--batch-size", "4"]
    assert run(monkeypatch, *words, "--json", str(file)) == 130
    assert json.loads(file.read_text())["n"] == 4


@pytest.mark.parametrize("columns", [40, 80, 120, 150])
def test_numbers_are_whole_in_a_terminal_of_any_width(
    monkeypatch, capsys, models, prompts, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ["--prompts", prompts, "--num-samples", "6", "--temperature", "1e-5"]
    assert run(monkeypatch, *models, *words) == 0
    table = capsys.readouterr().out.split("estimator", 1)[1].split("* biased")[0]
    assert "…" not in table
    assert ("exact per token" in table) == (columns == 150)


def test_one_response_has_no_interval_and_the_report_says_so(monkeypatch, capsys, models, prompts):
    assert run(monkeypatch, *models, "--prompts", prompts, "--num-samples", "1") == 0
    assert "Note: There is no interval: one response" in capsys.readouterr().out


def test_truncation_without_log_probs_is_refused(monkeypatch, capsys, tmp_path, models):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"prompt": "the film", "completion": "was good"}) + "\n")
    words = [*models[:4], "--completions", str(file), "--truncate-at", "2"]
    assert run(monkeypatch, *words) == 2
    assert "c.jsonl has no log-probs, so no weights" in capsys.readouterr().err


def test_completions_are_replayed(monkeypatch, tmp_path, capsys, models):
    file = tmp_path / "c.jsonl"
    row = {"prompt": "the film", "completion": "was good", "logprobs": [-1.0, -2.0]}
    file.write_text(3 * (json.dumps(row) + "\n"))
    models = models[:4]  # without --max-new-tokens
    assert run(monkeypatch, *models, "--completions", str(file), "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["n"] == 3
    assert record["ess"] == pytest.approx(3)
    assert record["tokens"] == 6


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--top-p", "0.9"], "truncated sampler is another policy"),
        (["--top-k", "5"], "truncated sampler is another policy"),
        (["--num-samples", "0"], "must be at least 1"),
        (["--num-samples", "nonsense"], "num-samples"),
        (["--max-samples", "-5"], "max_samples=-5: must be at least 1"),
        (["--num-samples", "3", "--samples-per-prompt", "2"], "exclude each other"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--estimator", "k9"], "--estimator k9: use one of k1"),
        (["--samples-per-prompt", "-1"], "--samples-per-prompt -1: must be at least 1"),
        (["--policy", ""], "--policy is empty"),
        (["--prompts", ""], "--prompts is empty"),
        (["--estimand", "all"], "use one of population, given_prompts"),
        (["--dtype", "int8"], "use one of float32"),
        (["--device", "tpu"], "use cpu, cuda"),
        (["--device", "cpu:abc"], "use cpu, cuda"),
        (["--prompts", "nowhere.txt"], "no such file of prompts"),
        (["--completions", "c.jsonl"], "--max-new-tokens has no meaning beside --completions"),
        (["--html", "-"], "give the file"),
        (["--html", "/"], "it is a folder"),
        (["--json", "/nowhere/kl.json"], "there is no folder /nowhere"),
        (["--prompt-tokens", "0"], "must be at least 1"),
        (["--max-new-tokens", "100"], "the models take 64 and one"),
        (["--json", "kl.txt", "--html", "kl.txt"], "are both 'kl.txt'"),
        (["--max-samples", "9"], "--max-samples is the limit of --target-stderr"),
        (["--truncate-at", "2"], "--truncate-at cuts the weights of --completions"),
        (["--temperature", "1e-30"], "must be finite and at least 1e-06"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(monkeypatch, capsys, models, words, complaint):
    capsys.readouterr()  # saving the models said something
    assert run(monkeypatch, *models, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["--both"], ["--max-samples", "9"], ["--target-stderr", "1"], ["--num-samples", "9"]]
)
def test_options_of_sampling_are_refused_beside_completions(monkeypatch, capsys, models, words):
    assert run(monkeypatch, *models[:4], "--completions", "c.jsonl", *words) == 2
    assert f"{words[0]} has no meaning beside --completions" in capsys.readouterr().err


def test_a_file_of_completions_that_is_not_there_is_one_line(monkeypatch, capsys, models):
    assert run(monkeypatch, *models[:4], "--completions", "nowhere.jsonl") == 2
    assert capsys.readouterr().err.startswith("error: no such file of completions")


@pytest.mark.parametrize("prompt", [["a"], 3])
def test_a_prompt_that_is_no_text_is_refused(monkeypatch, capsys, tmp_path, models, prompt):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": prompt}) + "\n")
    assert run(monkeypatch, *models, "--prompts", str(file)) == 2
    assert f"prompt 0 is no text but {prompt!r}: leave such rows out" in capsys.readouterr().err


def test_a_file_of_prompts_that_is_no_text_is_refused(monkeypatch, capsys, tmp_path, models):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xff\xfe")
    assert run(monkeypatch, *models, "--prompts", str(file)) == 2
    assert "is not text in UTF-8" in capsys.readouterr().err


def test_max_samples_ends_the_sampling_in_any_case(monkeypatch, capsys, models, prompts):
    words = ["--prompts", prompts, "--target-stderr", "1e-9", "--max-samples", "5", "--json", "-"]
    assert run(monkeypatch, *models, *words) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 5


@pytest.mark.parametrize("seed", [10**20, -1])
def test_any_integer_is_a_seed(monkeypatch, capsys, models, prompts, seed):
    words = ["--prompts", prompts, "--num-samples", "2", "--seed", str(seed), "--json", "-"]
    assert run(monkeypatch, *models, *words) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == seed


def test_models_that_are_not_there_are_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "--policy", "/nowhere/model", "--ref", "embedded") == 2
    assert capsys.readouterr().err == "error: no such model folder: /nowhere/model\n"


def test_help_shows_an_example(monkeypatch, capsys):
    from rlkl.kl import ESTIMATORS

    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "rlkl kl --policy" in out
    assert "\\b" not in out
    assert all(name in out for name in ESTIMATORS)  # that --estimator may name
