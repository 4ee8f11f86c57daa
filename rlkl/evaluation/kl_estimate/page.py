"""The report as one self-contained HTML page: no script, no network, light and dark."""

import io
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

import rlkl
from rlkl.evaluation.kl_estimate.report import KIND, Estimate, KLReport, Profile

_INK, _EXACT, _SAMPLED = "#010203", "#0a7d62", "#c0562b"
"""_INK stands for the page's own text colour, which a stylesheet sets."""


def write_page(reports: list[KLReport], path: str | Path) -> None:
    """Writes one page for one direction, or for both.

    Args:
        reports: each direction's report, the first one quoted first.
        path: where to.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )
    environment.filters |= {
        "nats": _nats,
        "percent": _percent,
        "heat": _heat,
        "visible": _visible,
    }
    page = environment.get_template("page.html").render(
        directions=[_direction(report) for report in reports],
        first=reports[0],
        version=rlkl.__version__,
    )
    Path(path).write_text(page, encoding="utf-8")


def _template(name: str) -> str:
    return files("rlkl.evaluation.kl_estimate").joinpath(name).read_text("utf-8")


def _direction(report: KLReport) -> dict[str, Any]:
    """What the template shows of one direction."""
    scale = max((token.kl for sample in report.samples for token in sample.tokens), default=0.0)
    return {
        "report": report,
        "rows": _forest(report),
        "profile": _profile_svg(report),
        "heat_scale": scale,
        "widest_share": max((t.share for t in report.top_tokens), default=1.0),
    }


def _forest(report: KLReport) -> list[dict[str, Any]]:
    """A row per estimator: where its interval lies on a common axis, in percent of the width.

    The axis spans the finite intervals of the unbiased estimators, where there are any, so that one
    wild interval or a biased estimate does not flatten the rest; what lies outside is cut at its
    edge.
    """
    finite = [e for e in report.estimators.values() if math.isfinite(e.stderr)]
    finite = [e for e in finite if e.unbiased] or finite
    low = min((e.ci95[0] for e in finite), default=0.0)
    high = max((e.ci95[1] for e in finite), default=1.0)
    span = (high - low) or 1.0

    def place(x: float) -> float:
        return 100 * min(max((x - low) / span, 0.0), 1.0) if math.isfinite(x) else 0.0

    of_k1 = report.estimators["k1"].stderr

    def row(name: str, e: Estimate) -> dict[str, Any]:
        left, right = place(e.ci95[0]), place(e.ci95[1])
        return {
            "name": name,
            "estimate": e,
            "kind": KIND.get(name, ""),
            "left": left,
            "width": right - left,
            "middle": place(e.nats_per_response),
            "quoted": name == report.headline,
            "of_k1": e.stderr / of_k1 if 0 < of_k1 < math.inf else None,
        }

    return [row(name, e) for name, e in report.estimators.items()]


def _profile_svg(report: KLReport) -> str:
    """KL by position with 95% bands, as inline SVG in the page's colours."""
    profile = report.profile
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.add_subplot()
    x = list(range(1, len(profile.kl) + 1))
    _band(axis, x, profile.sampled, profile.sampled_half_width, _SAMPLED, "sampled (k1)")
    _band(axis, x, profile.kl, profile.half_width, _EXACT, "exact (rb)")
    axis.axhline(0, color=_INK, linewidth=0.6, alpha=0.4)
    axis.set_ylim(_limits(profile))
    axis.set_xlabel("position in the response", color=_INK)
    axis.set_ylabel("nats per token", color=_INK)
    axis.tick_params(colors=_INK)
    axis.margins(x=0.01)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axis.legend(frameon=False, labelcolor=_INK, ncols=2, loc="upper right")
    figure.patch.set_alpha(0)
    axis.patch.set_alpha(0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _limits(profile: Profile) -> tuple[float, float]:
    """Of the vertical axis, by the means: bands of positions that two or three responses reach
    would flatten the rest.
    """
    means = [0.0, *profile.kl, *profile.sampled]
    margin = 0.3 * (max(means) - min(means)) or 1.0
    return min(means) - margin, max(means) + margin


def _band(
    axis: Axes, x: list[int], mean: list[float], half: list[float], color: str, label: str
) -> None:
    marker = "o" if len(x) == 1 else ""
    axis.plot(x, mean, color=color, label=label, linewidth=1.6, marker=marker)
    low = [m - h if math.isfinite(h) else m for m, h in zip(mean, half, strict=True)]
    high = [m + h if math.isfinite(h) else m for m, h in zip(mean, half, strict=True)]
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _nats(x: float) -> str:
    if not math.isfinite(x):
        return "∞" if x > 0 else "-∞"
    return f"{x:.3g}" if abs(x) < 1 else f"{x:.2f}"


def _percent(x: float) -> str:
    """Two digits of what is small, and no exponent."""
    return f"{x:.1%}" if x >= 0.001 or x == 0 else f"{x:.2%}" if x >= 0.0001 else "<0.01%"


def _heat(kl: float, scale: float) -> str:
    """Opacity of a token's background: the square root makes middling values visible."""
    return f"{math.sqrt(min(kl / scale, 1.0)) if scale > 0 else 0.0:.2f}"


def _visible(token: str) -> str:
    """A token as text, with what cannot be seen made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣", 1) or "∅"
