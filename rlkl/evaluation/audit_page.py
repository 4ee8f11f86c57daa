"""An audit as a web page: one self-contained file, without scripts."""

import io
from html import escape
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, BboxBase

EXACT = 1e-9
"""Relative errors below it are rounding."""
CLOSE = 0.25
COLOURS = {"green": "#dff3e3", "yellow": "#fdf3cd", "red": "#fbdfdc", "": "transparent"}
HEADINGS = {
    "value_bias": ("bias", "E[value] − exact, nats per response"),
    "value_var": ("variance", "of one response's value, nats²"),
    "grad_rel_err": ("error", "‖E[g] − ∇D‖ / ‖∇D‖ of the expected gradient"),
    "grad_cos": ("cosine", "of the expected gradient with the true one"),
    "grad_var": ("variance", "trace of the covariance of one response's gradient"),
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; max-width: 75rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .6rem; border-bottom: 1px solid #e4e6ea; text-align: left }
td.number, th.number { text-align: right } th { font-weight: 600; vertical-align: bottom }
td.note { color: #555; font-size: .86em; min-width: 9rem; overflow-wrap: anywhere }
code { font-size: .95em }
.key span { padding: .1rem .5rem; border-radius: .3rem; margin-right: .4rem }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto }
"""


def formatted(row: dict[str, Any], key: str) -> str:
    """A number of a row for people: 0 for rounding errors, – where there is none."""
    value = row[key]
    if value is None:
        return "–"
    if abs(value) < EXACT:
        return "0"
    return f"{value:+.3g}" if key in ("value_bias", "grad_cos") else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in percent with three digits, however small: 0 only where it is 0."""
    return f"{100 * share:.3g}%"


def who_sampled_off(record: dict[str, Any]) -> str:
    """A sentence on the rows with sampling "off"."""
    if not record["other_sampler"]:
        return "The policy itself sampled again: the models have no other sampler."
    return (
        f"An older policy sampled; its effective sample size is {percent(record['ess_fraction'])}, "
        f"and {percent(record['truncated_fraction'])} of the tokens have a prefix weight over "
        f"{record['truncate_at']:g}."
    )


def verdict(row: dict[str, Any], key: str, exact_kl: float) -> str:
    """green, yellow, red, or "" for a number that is not judged (variances)."""
    value = row[key]
    if value is None or key.endswith("_var"):
        return ""
    distance = {
        "value_bias": abs(value) / max(exact_kl, EXACT),
        "grad_rel_err": value,
        "grad_cos": 1 - value,
    }[key]
    if distance < EXACT:
        return "green"
    return "yellow" if distance < CLOSE else "red"


def audit_page(record: dict[str, Any]) -> str:
    """The page of a record of `rlkl.evaluation.audit.audit`."""
    exact = record["exact_kl"]
    parts = [
        f"<p>D<sub>KL</sub>(policy ‖ ref) = <b>{exact:.5f}</b> nats per response, the sum over "
        f"all {record['responses']} responses of a language model with {record['vocab']} tokens "
        f"and at most {record['length']} steps. Nothing is sampled: every number is exact.</p>",
        '<p class="key">'
        + "".join(
            f'<span style="background:{COLOURS[colour]}">{text}</span>'
            for colour, text in (
                ("green", "exact"),
                ("yellow", f"off by less than {CLOSE:.0%}"),
                ("red", "off by more"),
            )
        )
        + "</p>",
        "<h2>Right and quiet</h2><p>Each form of the KL gradient: how far its expectation is from "
        "the true gradient, and how much one response's gradient varies. The place to be is the "
        f"lower left.</p><figure>{_scatter(record)}</figure>",
    ]
    introductions = {
        "on": "The policy's own responses: a first update.",
        "off": "A later epoch, an asynchronous sampler. " + who_sampled_off(record),
    }
    for title, key in (("Libraries", "configurations"), ("Estimator × placement", "rows")):
        for sampling, introduction in introductions.items():
            rows = [row for row in record[key] if row["sampling"] == sampling]
            parts.append(f"<h2>{title} · sampling {sampling}</h2><p>{introduction}</p>")
            parts.append(_table(rows, exact))
    parts.append(
        "<p>A library's configuration is its KL term alone, summed over a response's tokens: "
        "without reward, advantage normalisation, clipping, critic and baseline, with γ = λ = 1. "
        "Response-level estimators (cv, mcv) have their best coefficients; fitted ones tend to "
        "them.</p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>KL audit</title><style>{STYLE}</style></head><body>"
        "<h1>What each KL term estimates and optimises</h1>" + "\n".join(parts) + "</body></html>\n"
    )


def _table(rows: list[dict[str, Any]], exact_kl: float) -> str:
    named = "name" in rows[0]
    start = ["configuration"] if named else []
    head = "".join(f"<th>{label}</th>" for label in [*start, "estimator", "placement"])
    for key, (label, meaning) in HEADINGS.items():
        side = "value" if key.startswith("value") else "gradient"
        head += f'<th class="number" title="{escape(meaning)}">{side}<br>{label}</th>'
    head += "<th>what it is</th>" if named else ""
    body = ""
    for row in rows:
        cells = [f"<b>{escape(row['name'])}</b>"] if named else []
        cells += [f"<code>{escape(row['estimator'])}</code>", escape(row["placement"])]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells)
        for key in HEADINGS:
            colour = COLOURS[verdict(row, key, exact_kl)]
            number = formatted(row, key)
            body += f'<td class="number" style="background:{colour}">{number}</td>'
        if named:
            body += f'<td class="note">{escape(row["note"])}<br>{escape(row["source"])}</td>'
        body += "</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _scatter(record: dict[str, Any]) -> str:
    """Gradient error against gradient variance, on-policy, as SVG."""
    points: dict[tuple[float, float], list[str]] = {}
    for row in record["rows"]:
        if row["sampling"] == "on" and row["grad_rel_err"] is not None:
            place = (round(row["grad_var"], 6), round(row["grad_rel_err"], 6))
            points.setdefault(place, []).append(f"{row['estimator']} · {row['placement']}")
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots()
    for (variance, error), _ in sorted(points.items()):
        colour = "#1a7f37" if error < EXACT else "#cf222e" if error > CLOSE else "#9a6700"
        axes.plot(variance, error, "o", color=colour)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("variance of one response's gradient")
    axes.set_ylabel("relative error of the expected gradient")
    axes.margins(x=0.12, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()  # the places are known from here on
    dots = axes.transData.transform(sorted(points))
    taken: list[BboxBase] = [Bbox([(x - 4, y - 4), (x + 4, y + 4)]) for x, y in dots]
    for place, names in sorted(points.items()):
        text = "\n".join(names)
        label = axes.annotate(text, place, (5, 0), textcoords="offset points", fontsize=8)
        for height in (4, -10, 14, -20, 24):
            label.set_position((5, height))
            if not any(label.get_window_extent().overlaps(other) for other in taken):
                break
        taken.append(label.get_window_extent())
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlkl"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
