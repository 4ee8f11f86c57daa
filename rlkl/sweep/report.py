"""The report of a sweep: a page, a figure for a paper, all records, and what produced them."""

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from scipy import stats

import rlkl
from rlkl.sweep import figures
from rlkl.sweep.analysis import Comparison
from rlkl.sweep.export import Analysis, analyse, frontier_json, write_csv
from rlkl.sweep.findings import cut_at, findings, missing_runs, percent, plain, signed
from rlkl.sweep.records import SweepResult
from rlkl.sweep.spec_file import spec_yaml

FILES = ("index.html", "frontier.png", "frontier.pdf", "points.csv", "frontier.json")
FILES += ("records.jsonl", "spec.yaml", "versions.json")
Z = figures.Z
_SPEC_HEAD = """\
# The sweep of this report: rlkl sweep run spec.yaml
# A recipe or script is looked for beside this file; give its path where it lies elsewhere.
"""


def write_report(result: SweepResult, folder: Path) -> Analysis:
    """Writes ``FILES`` to a folder; the page needs nothing beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    analysis = analyse(result)
    # A sample may hold half of a surrogate pair, which UTF-8 has no bytes for.
    (folder / "index.html").write_text(page(analysis), encoding="utf-8", errors="replace")
    figure = figures.still_figure(analysis)
    for kind in ("png", "pdf"):
        figure.savefig(folder / f"frontier.{kind}", dpi=200)
    write_csv(analysis, folder / "points.csv")
    (folder / "frontier.json").write_text(json.dumps(frontier_json(analysis)) + "\n")
    result.save(folder / "records.jsonl")
    (folder / "spec.yaml").write_text(_SPEC_HEAD + spec_yaml(result.spec), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(versions(result), indent=2) + "\n")
    return analysis


def versions(result: SweepResult) -> dict[str, str]:
    """Of the packages that measured the cells and that wrote the report."""
    here = {n: importlib.metadata.version(n) for n in ("moocore", "plotly", "numpy")}
    here |= {"rlkl": rlkl.__version__, "python": platform.python_version()}
    return {**result.versions, **{f"report/{name}": version for name, version in here.items()}}


def page(analysis: Analysis) -> str:
    """The page as HTML, with plotly's code, data and styles inside."""
    environment = Environment(
        loader=PackageLoader("rlkl.sweep", "."), autoescape=True, trim_blocks=True
    )
    result, front = analysis.result, analysis.reward
    plots = {
        "reward": _embed(figures.interactive_frontier(analysis, front), "frontier"),
        "judge": analysis.judge
        and _embed(figures.interactive_frontier(analysis, analysis.judge), "judge"),
        "attainment": _embed(figures.interactive_attainment(analysis, front), "attainment"),
        "comparisons": [
            _embed(figures.interactive_comparison(c, "reward"), f"comparison-{i}")
            for i, c in enumerate(front.comparisons[:6])
        ],
    }
    kl_ref, reward_ref = front.reference_point
    compared = "algorithm" if len(result.algorithms) > 1 else "estimator"
    least = "the reference model's own reward" if result.reference else "the least reward measured"
    return environment.get_template("report.html.j2").render(
        result=result,
        plotly=Markup(get_plotlyjs()),
        plots=plots,
        findings=findings(analysis),
        missing=missing_runs(result),
        caption=_caption(analysis),
        compared=compared,
        judged=analysis.judge is not None,
        arms=_arm_rows(analysis),
        reference_point=(
            "Share: of the points on the common front of all runs. Hypervolume: the area between "
            f"an {compared}'s points of one seed and the reference point ({kl_ref:.2f} nats: the "
            f"largest KL measured; {reward_ref:+.2f}: {least}), in nats "
            "times reward, mean over seeds. In brackets 95% intervals over seeds (bootstrap "
            "within configurations), for these prompts: other prompts are not in them."
        ),
        comparisons=[_comparison_row(analysis, c) for c in front.comparisons],
        configurations=_configuration_rows(analysis),
        samples=_samples(result),
        spec=spec_yaml(result.spec),
        measured=yaml.safe_dump_all(result.measured, sort_keys=False),
        versions=yaml.safe_dump(versions(result), sort_keys=False),
    )


def _embed(figure: go.Figure, name: str) -> Markup:
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "displayModeBar": "hover"},
    )
    return Markup(html)


def _caption(analysis: Analysis) -> str:
    result, reference = analysis.result, analysis.result.reference
    evaluation = result.spec.get("evaluation", {})
    asked = evaluation.get("prompts", "?")  # where a record does not say how many
    measured = " or ".join({str(point.extra.get("prompts", asked)) for point in result.points})
    cut = f", of responses cut at {cut_at(result)}" if result.response_lengths else ""
    commands = " and ".join(f"rlkl {name}" for name in result.algorithms)
    text = (f"Trained by {commands}. " if commands else "") + (
        f"Every run is measured on the same {measured} held-out prompts, "
        f"{evaluation.get('responses_per_prompt', '?')} responses each, with the same random "
        f"numbers; KL exact per token{cut}; error bars are 1.96 standard errors, clustered by "
        "prompt. "
        "Click a point for its texts."
    )
    if reference is not None and result.curve("optimal"):
        drop = reference.get("half_sample_drop")  # None: nothing is trusted, or an older record
        fewer = "" if drop is None else f"; from half of them it is lower by up to {drop:.2g} there"
        text += (
            f" Optimum: the reference tilted by exp(reward/β), from {reference['samples']} samples "
            "for each of the same prompts, which carry it up to "
            f"{reference['trusted_kl']:.2f} nats (at least 16 effective samples){fewer}; the band "
            "is the error over prompts. Up to the errors, no policy has more reward at the same KL."
        )
    if result.curve("best_of_n"):
        text += " Best of n is drawn at the upper bound of its KL."
    return text


def _arm_rows(analysis: Analysis) -> list[dict[str, Any]]:
    fronts = [f for f in (analysis.reward, analysis.judge) if f is not None]
    return [
        {
            "arm": arm,
            "cells": [
                cell
                for f in fronts
                for cell in (
                    percent(f.share_on_front[arm]),
                    plain(f.hypervolume[arm]) if arm in f.hypervolume else "–",
                )
            ],
        }
        for arm in analysis.result.arms
    ]


def _comparison_row(analysis: Analysis, comparison: Comparison) -> list[str]:
    d = comparison.difference
    volumes = analysis.reward.hypervolume_difference
    pair = comparison.first, comparison.second
    return [
        f"{comparison.first} − {comparison.second}",
        signed(comparison.mean),
        f"{comparison.kls[0]:.2f} to {comparison.kls[-1]:.2f}",
        *(signed(e) for e in (d[0], d[len(d) // 2], d[-1])),
        signed(volumes[pair]) if pair in volumes else "–",
    ]


def _configuration_rows(analysis: Analysis) -> list[list[str]]:
    efficiency: dict[int, list[str]] = {}
    for point, found in zip(analysis.result.points, analysis.efficiency, strict=True):
        if found is not None and point.last:
            bound = "≤ " if found.upper_bound else "≥ " if found.lower_bound else ""
            share = f"{bound}{found.share:.0%}" if found.known else "?"
            efficiency.setdefault(point.configuration, []).append(share)
    rows = []
    for row in analysis.means:
        measures = [n for n in ("kl", "reward", "judge") if n in row]
        sign = {"kl": "", "reward": "+", "judge": "+"}
        times = stats.t.ppf(0.975, row["seeds"] - 1) if row["seeds"] > 1 else Z
        cells = [f"{row[n]:{sign[n]}.2f} ± {times * row[f'{n}_se']:.2f}" for n in measures]
        shares = ", ".join(efficiency.get(row["configuration"], []))
        rows.append([row["label"], str(row["seeds"]), *cells, shares])
    return rows


def _samples(result: SweepResult) -> Iterable[dict[str, Any]]:
    for point in sorted(result.ends, key=lambda p: (p.configuration, p.seed)):
        texts = result.samples.get(point.run_id, [])
        if texts:
            title = (
                f"{point.label}, seed {point.seed}: KL {point.kl:.2f}, reward {point.reward:+.2f}"
            )
            yield {"id": point.run_id, "title": title, "texts": texts}
