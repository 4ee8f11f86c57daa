"""The report: its files, what stands on the page, and the page in a browser at two widths."""

import csv
import json
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from rlkl.sweep import figures
from rlkl.sweep.export import analyse, frontier_json
from rlkl.sweep.findings import findings
from rlkl.sweep.records import SweepResult, check_record
from rlkl.sweep.report import FILES, _configuration_rows, page, write_report


@pytest.fixture(scope="module")
def report(make_result: Callable[..., SweepResult], tmp_path_factory) -> Path:
    """A report of the made sweep."""
    folder = tmp_path_factory.mktemp("report")
    write_report(make_result(), folder)
    return folder


def test_a_report_has_all_its_files_and_its_records_make_the_same_report(make_result, report):
    result = make_result()
    assert set(FILES) <= {file.name for file in report.iterdir()}
    again = SweepResult.load(report / "records.jsonl")
    assert again == result
    stored = json.loads((report / "frontier.json").read_text())
    assert json.loads(json.dumps(frontier_json(analyse(again)))) == stored
    with (report / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.points)
    assert float(rows[3]["kl"]) == result.points[3].kl
    assert (report / "frontier.pdf").read_bytes().startswith(b"%PDF")


def test_records_with_any_text_are_saved_and_read_again(make_result, tmp_path):
    """Line breaks that JSON leaves as they are, and half of a surrogate pair, which UTF-8 lacks."""
    result = make_result(configurations=2)
    text = "next\x85line \u2028 and \u2029, \r\n, caf\u00e9, half \ud83d"
    odd = replace(result, samples={"000-seed0": [{"prompt": "a", "response": text, "reward": 1.0}]})
    write_report(odd, tmp_path)
    assert SweepResult.load(tmp_path / "records.jsonl") == odd
    assert "caf\u00e9, half ?" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_records_written_without_escapes_are_read(make_result, tmp_path):
    result = make_result(configurations=2)
    odd = replace(result, samples={"000-seed0": [{"response": "next\x85line \u2028"}]})
    file = tmp_path / "records.jsonl"
    odd.save(file)
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert SweepResult.load(file) == odd


def test_records_that_count_a_run_twice_are_refused(make_result, tmp_path):
    result = make_result(configurations=2, checkpoints=2)
    file, joined = tmp_path / "records.jsonl", tmp_path / "joined.jsonl"
    result.save(file)
    head, *lines = file.read_text().splitlines()
    for rows, said in (
        ([head, *lines, head, *lines], "a line twice"),
        ([head, *lines, *lines], "a line twice"),
        ([head, *lines, lines[0]], "a line twice"),
        ([head, *lines, head.replace("made", "other")], "two sweeps"),
        ([head, *lines, lines[1].replace('"kl"', ' "kl"')], "000-seed0 has 2 points that end it"),
        ([head, *lines[:1], *lines[2:]], "000-seed0 has 0 points that end it"),
        ([head, *lines, *(line.replace("001-seed2", "x") for line in lines[-2:])], "one run"),
    ):
        joined.write_text("\n".join(rows))
        with pytest.raises(ValueError, match=said):
            SweepResult.load(joined)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:40]], "record 7 is not JSON"),
        (lambda lines: ["[1]", *lines], "its first line names none"),
        (lambda lines: [*lines, "[1]"], "its first line names none"),
        (lambda lines: [*lines, '{"run_id": "x"}'], "record 8 has no number step"),
        (lambda lines: [line.replace('"kl": ', '"k": ') for line in lines], "has no number kl"),
        (lambda lines: [line.replace('"arm": ', '"brm": ') for line in lines], "this version's"),
        (lambda lines: [lines[0].replace('"failed"', '"f"'), *lines[1:]], "this version's"),
        (lambda lines: [line.replace('"judge_se"', '"x"') for line in lines], "number judge_se"),
    ],
)
def test_what_is_no_file_of_records_is_refused(make_result, tmp_path, change, said):
    file = tmp_path / "records.jsonl"
    make_result(configurations=2).save(file)
    file.write_text("\n".join(change(file.read_text().splitlines())))
    with pytest.raises(ValueError, match=said):
        SweepResult.load(file)


def test_the_page_needs_nothing_from_elsewhere_and_escapes_the_texts(report):
    whole, bundle = (report / "index.html").read_text(), get_plotlyjs()
    assert whole.count(bundle) == 1, "plotly's code stands there once"
    page = whole.replace(bundle, "")
    for outside in ('src="http', "src='http", 'href="http', "@import"):
        assert outside not in page
    assert "This &lt;b&gt;film" in page
    assert "This <b>film" not in page


def test_a_share_of_the_optimum_that_says_nothing_is_not_given_as_a_number(make_result):
    """Rewards known to ± 20 where about 2 can be gained: any number would be "-17% ± 1337%"."""
    result = make_result(configurations=4)
    noisy = [replace(p, kl=p.kl / 2, reward_se=10.0) for p in result.points]
    analysis = analyse(replace(result, points=noisy), resamples=2)
    assert not any(e.known for e in analysis.efficiency)
    said = " ".join(line["text"] for line in findings(analysis))
    assert "no share of the possible gain can be told of the 12 runs" in said
    assert "of the gain that is possible" not in said
    assert {row[-1] for row in _configuration_rows(analysis)} == {"?, ?, ?"}
    for shown in (analysis, analyse(result, resamples=2)):
        hover = figures.interactive_frontier(shown, shown.reward).to_json()
        assert ("gain at this KL" in hover) == (shown is not analysis)


@pytest.mark.parametrize(("seeds", "times"), [(1, 1.96), (2, 12.706), (3, 4.303)])
def test_the_intervals_of_configurations_have_the_freedom_of_their_seeds(make_result, seeds, times):
    analysis = analyse(make_result(configurations=2, seeds=seeds), resamples=2)
    for row, mean in zip(_configuration_rows(analysis), analysis.means, strict=True):
        kl, half = row[2].split(" ± ")
        assert float(kl) == pytest.approx(mean["kl"], abs=0.005)
        assert float(half) == pytest.approx(times * mean["kl_se"], abs=0.005)


def test_runs_below_the_reference_are_counted_and_give_no_upper_bound(make_result, tmp_path):
    result = make_result()
    points = [replace(p, reward=-1.0 if p.kl > 3.4 else p.reward) for p in result.points]
    below = sum(p.kl > 3.4 for p in points)
    analysis = write_report(replace(result, points=points), tmp_path)
    said = " ".join(line["text"] for line in findings(analysis))
    assert "upper bounds" not in said
    assert f"{below} runs beyond have less reward than the reference" in said
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(row["efficiency_is_lower_bound"] == "True" for row in rows) == below
    page = (tmp_path / "index.html").read_text()
    assert "at least -" in page
    assert "≥ -" in page


def test_of_many_pairs_of_arms_those_that_differ_most_are_said(make_result):
    """Twelve arms as in recipes/compare_estimators.yaml: 66 pairs."""
    result = make_result(configurations=24)
    points = [
        replace(p, arm=f"arm {p.configuration % 12}", reward=p.reward + p.configuration % 12)
        for p in result.points
    ]
    analysis = analyse(replace(result, points=points), resamples=5)
    pairs = len(analysis.reward.comparisons)
    assert pairs > 20
    lines = [line["text"] for line in findings(analysis) if "t equal KL" in line["text"]]
    assert len(lines) < 12
    assert f" of {pairs} pairs differ" in lines[0]
    largest = max(abs(c.mean.value) for c in analysis.reward.comparisons)
    assert f"+{largest:.2f} [" in lines[1]
    assert f"Of {pairs} pairs the first 6 are drawn" in page(analysis)


GRID = {
    "seeds": [0, 1, 2],
    "settings": {},
    "grid": {"kl_coef": [1.0, 0.5, 0.333, 0.25], "kl_estimator": ["k1", "rb"]},
    "search": None,
}


def test_missing_seeds_are_named_everywhere(make_result, tmp_path):
    result = make_result()
    gone = {"000-seed1", "003-seed1", "003-seed2"}
    points = [p for p in result.points if p.run_id not in gone]
    part = replace(result, points=points, spec=result.spec | GRID)
    analysis = write_report(part, tmp_path)
    first = findings(analysis)[0]
    assert first["warn"]
    assert (
        "3 of 24 cells are missing (k1 kl_coef=1: seed 1; rb kl_coef=0.5: seeds 1, 2)."
        in (first["text"])
    )
    assert "No hypervolume" not in first["text"]
    assert "<li>rb kl_coef=0.5: seeds 1, 2</li>" in (tmp_path / "index.html").read_text()
    stored = json.loads((tmp_path / "frontier.json").read_text())
    assert stored["missing"][0] == {"label": "k1 kl_coef=1", "seed": 1}
    assert len(stored["missing"]) == 3
    assert replace(result, spec=result.spec | GRID).missing == []
    assert replace(part, spec={}).missing == part.missing, "what other runs have is asked of each"


def test_an_arm_without_a_run_of_each_configuration_has_no_hypervolume(make_result, tmp_path):
    """As a sweep is looked at before its first seed is through: rb's last two have not begun."""
    result = make_result(seeds=1)
    points = [p for p in result.points if p.configuration not in (5, 7)]
    part = replace(result, points=points, spec=result.spec | GRID)
    analysis = write_report(part, tmp_path)
    assert set(analysis.reward.hypervolume) == {"k1"}
    assert analysis.reward.hypervolume_difference == {}
    said = findings(analysis)[0]["text"]
    assert "18 of 24 cells are missing" in said
    assert "rb kl_coef=0.25: seeds 0, 1, 2" in said
    assert "No hypervolume of rb" in said
    stored = json.loads((tmp_path / "frontier.json").read_text())
    assert set(stored["hypervolume"]) == {"k1"}


def test_configurations_that_a_search_has_yet_to_choose_are_missing(make_result):
    result = make_result(configurations=4, seeds=1)
    spec = {
        "seeds": [0],
        "settings": {},
        "grid": {"kl_estimator": ["k1", "rb"]},
        "search": {"fields": {"kl_coef": {"low": 0.1, "high": 1.0}}, "configurations": 6},
    }
    missing = replace(result, spec=spec).missing
    assert [c.label for c in missing] == ["k1 (configuration 4)", "rb (configuration 5)"]
    assert not any(c.measured for c in missing)


def test_the_json_has_the_documented_keys(make_result):
    record = frontier_json(analyse(make_result(), resamples=20))
    point = {"run_id", "estimator", "kl_coef", "seed", "kl_nats", "kl_se", "reward", "reward_se"}
    assert point | {"on_front", "efficiency"} <= record["points"][0].keys()
    assert "kl" not in record["points"][0]
    assert set(record["share_on_front"]) == {"k1", "rb"} == set(record["share_on_front_ci95"])
    assert sum(record["share_on_front"].values()) == pytest.approx(1.0)
    assert set(record["hypervolume"]["rb"]) == {"value", "ci95"}
    assert len(record["reference_point"]) == 2
    assert all(kl > 0 and reward > 0 for kl, reward in record["optimal"])
    assert len(record["optimal_trusted"]) == len(record["optimal"])
    assert record["best_of_n"][0][0] == 1
    json.dumps(record, allow_nan=False)


def test_a_sweep_without_reference_and_judge_is_reported_too(make_result, tmp_path):
    result = make_result(configurations=2)
    points = [type(p)(**{**vars(p), "judge": None, "judge_se": None}) for p in result.points]
    bare = SweepResult(**{**vars(result), "points": points, "reference": None})
    write_report(bare, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "held-out judge" not in page
    assert f"{min(p.reward for p in points):+.2f}: the least reward measured" in page


def test_a_judge_that_never_saw_the_reference_is_left_out(make_result):
    result = make_result(configurations=2)
    reference = {k: v for k, v in result.reference.items() if not k.startswith("judge")}
    assert analyse(replace(result, reference=reference), resamples=2).judge is None


def test_each_of_twelve_arms_looks_different():
    arms = [f"arm {number}" for number in range(12)]
    drawn = figures.styles(arms)
    assert list(drawn) == arms
    for style in ((0, 1), (0, 2)):  # colour with matplotlib's marker, colour with plotly's
        assert len({tuple(drawn[arm][i] for i in style) for arm in arms}) == 12


def test_twelve_lines_of_what_is_attained_look_different(make_result):
    result = make_result(configurations=12, seeds=1)
    points = [replace(p, arm=f"arm {p.configuration}") for p in result.points]
    analysis = analyse(replace(result, points=points), resamples=2)
    lines = figures.interactive_attainment(analysis, analysis.reward).data
    assert len({(line.line.color, line.line.dash) for line in lines}) == 12


def test_a_configurations_efficiency_is_its_own_whatever_it_is_called(make_result):
    result = make_result(configurations=4)
    same = [replace(p, label="one name") for p in result.points]
    of_each = [row[-1] for row in _configuration_rows(analyse(result, resamples=2))]
    assert len(set(of_each)) == 4
    assert [
        row[-1] for row in _configuration_rows(analyse(replace(result, points=same), resamples=2))
    ] == of_each


def test_a_reference_of_few_samples_has_no_known_optimum_and_is_reported(make_result, tmp_path):
    result = make_result(configurations=2)
    for point in result.reference["optimal"]:
        point["trusted"] = False
    write_report(result, tmp_path)
    assert (tmp_path / "frontier.png").is_file()


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({"best_of_n": []}, "Optimum: the reference tilted", "Best of n is"),
        ({"optimal": []}, "Best of n is", "Optimum: the reference tilted"),
        (None, "Every run is measured", "Optimum: the reference tilted"),
    ],
)
def test_a_reference_without_a_curve_is_reported_without_it(
    make_result, tmp_path, changes, said, unsaid
):
    """An evaluator of one's own need not measure the optimum, nor best of n."""
    result = make_result(configurations=2)
    reference = {"reward": 0.5} if changes is None else result.reference | changes
    analysis = write_report(replace(result, reference=reference), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert said in page
    assert unsaid not in page
    assert analysis.reward.reference_point[1] == reference["reward"]
    labels = figures.still_figure(analysis).axes[0].get_legend_handles_labels()[1]
    assert ("optimum" in labels) == bool(reference.get("optimal"))
    assert ("best of n (at most this KL)" in labels) == bool(reference.get("best_of_n"))


def test_a_reference_without_reward_is_no_measurement():
    check_record({"points": [], "reference": {"reward": 0.5}}, reference=True)
    with pytest.raises(ValueError, match="reference has no number reward"):
        check_record({"points": [], "reference": {"judge": 0.5}}, reference=True)


def test_numbers_that_were_measured_in_several_ways_are_marked_and_older_records_are_not(
    make_result, tmp_path
):
    result = make_result(configurations=4, seeds=2)
    assert result.measured == []
    silent = [line["text"] for line in findings(analyse(result, resamples=2))]
    assert not any("measured" in text for text in silent), "no record says how"

    way = {"prompts": 8, "temperature": 1.0, "max_prompt_length": None}
    alike = replace(result, points=[replace(p, measured=way) for p in result.points])
    assert findings(analyse(alike, resamples=2)) == findings(analyse(result, resamples=2))

    points = alike.points
    mixed = [replace(points[0], measured=way | {"temperature": 0.7}), *points[1:]]
    first, *_ = findings(analyse(replace(alike, points=mixed), resamples=2))
    assert first["warn"]
    assert (
        "do not compare: they were measured in 2 ways (temperature is 0.7 or 1.0)" in first["text"]
    )

    reference = {**alike.reference, "measured": way | {"prompts": 4}}
    first, *_ = findings(analyse(replace(alike, reference=reference), resamples=2))
    assert "(prompts is 8 or 4)" in first["text"]

    part = replace(alike, points=[result.points[0], *points[1:]])
    first, *_ = findings(analyse(part, resamples=2))
    assert "1 of 8 runs do not say how they were measured" in first["text"]
    write_report(part, tmp_path)
    assert SweepResult.load(tmp_path / "records.jsonl") == part
    assert json.loads((tmp_path / "frontier.json").read_text())["measured"] == [way]
    assert "max_prompt_length: null" in (tmp_path / "index.html").read_text()


def test_algorithms_are_named_where_the_records_know_them(make_result):
    result = make_result(configurations=4, seeds=2)
    assert "Trained by" not in page(analyse(result, resamples=2))
    known = [replace(p, algorithm="rloo" if p.arm == "rb" else "ppo") for p in result.points]
    both = analyse(replace(result, points=known), resamples=2)
    assert "Trained by rlkl ppo and rlkl rloo. Every run" in page(both)
    assert "<th>algorithm</th>" in page(both)
    assert frontier_json(both)["points"][0]["algorithm"] == "ppo"


def test_the_page_says_at_which_length_responses_were_cut(make_result):
    result = make_result()
    assert "responses cut at" not in page(analyse(result, resamples=20))
    result = replace(result, spec=result.spec | {"settings": {"response_length": 24}})
    said = page(analyse(result, resamples=20))
    assert "KL exact per token, of responses cut at 24 tokens; error bars" in said
    assert "KL is that of responses cut at 24 tokens: " in said


def test_the_page_says_how_many_prompts_there_were(make_result):
    result = make_result(configurations=2)
    assert "same 8 held-out prompts" in page(analyse(result, resamples=2)), "as the spec says"
    fewer = [replace(p, extra={"prompts": 5}) for p in result.points]
    assert "same 5 held-out prompts" in page(analyse(replace(result, points=fewer), resamples=2))


def test_two_thousand_records_are_reported_in_ten_seconds_of_this_thread(make_result, tmp_path):
    result = make_result(configurations=100, seeds=4, checkpoints=5)
    assert len(result.points) == 2000
    begin = time.process_time()
    write_report(result, tmp_path)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("width", [1280, 600])
def test_the_page_in_a_browser(report, tmp_path, browser, width):
    """What is drawn is read off the page after its scripts ran, and off a screenshot."""
    probe = """<script>setTimeout(() => { const w = document.documentElement;
    document.title = JSON.stringify({plots: document.querySelectorAll(".main-svg").length > 0,
    points: document.querySelectorAll("#frontier .scatterlayer .point").length,
    overflow: w.scrollWidth - w.clientWidth}); }, 1500)</script></body>"""
    page = tmp_path / "probe.html"
    page.write_text((report / "index.html").read_text().replace("</body>", probe))
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --hide-scrollbars"
    )
    options += " --disable-quic --disable-background-networking --disable-component-update"
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [
            browser,
            *options.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},3000",
            "--virtual-time-budget=3000",
            f"--screenshot={shot}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    seen = json.loads(title.replace("&quot;", '"'))
    assert seen["plots"]
    assert seen["points"] >= 24
    assert seen["overflow"] <= 0, "nothing sticks out to the right"
    assert _is_not_blank(shot, width)


def _is_not_blank(png: Path, width: int) -> bool:
    from PIL import Image

    assert struct.unpack(">I", png.read_bytes()[16:20])[0] == width
    colours = Image.open(png).convert("RGB").getcolors(maxcolors=1 << 24)
    return colours is not None and len(colours) > 50
