"""The figures of a report: interactive (plotly) for the page, still (matplotlib) for a paper."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlkl.sweep.analysis import Comparison, Frontier
from rlkl.sweep.export import Analysis, score
from rlkl.sweep.frontier import Estimate
from rlkl.sweep.records import Point

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Okabe and Ito's, which colour-blind readers tell apart."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot")
_GREY, _DARK = "#777777", "#222222"
Z = 1.96


def styles(arms: list[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, matplotlib marker and plotly symbol of each arm.

    When the colours begin again, the markers have moved on by one: up to 49 arms look different.
    """
    count = len(COLOURS)
    shapes = [(number + number // count) % count for number in range(len(arms))]
    return {
        arm: (COLOURS[number % count], MARKERS[shape], _SYMBOLS[shape])
        for number, (arm, shape) in enumerate(zip(arms, shapes, strict=True))
    }


def title_of(measure: str) -> str:
    """What the vertical axis shows."""
    return "reward" if measure == "reward" else "judge's score (never trained on)"


def front_corners(analysis: Analysis, front: Frontier) -> tuple[list[float], list[float]]:
    """The Pareto front as a staircase by rising KL, up to the largest KL."""
    points = [
        (p.kl, value(p, front.measure))
        for p, on in zip(analysis.result.points, front.on_front, strict=True)
        if on
    ]
    kls, scores = zip(*sorted(points), strict=True)
    return [*kls, front.reference_point[0]], [*scores, scores[-1]]


def value(point: Point, measure: str) -> float:
    """A point's reward, or judge's score."""
    return getattr(point, measure)


# ---- interactive ---------------------------------------------------------------------------------


def interactive_frontier(analysis: Analysis, front: Frontier) -> go.Figure:
    """Points with error bars on both axes, their front, the optimum and best-of-n."""
    figure = go.Figure()
    _reference_traces(figure, analysis, front.measure)
    kls, scores = front_corners(analysis, front)
    figure.add_scatter(
        x=kls,
        y=scores,
        mode="lines",
        name="Pareto front",
        line={"shape": "hv", "color": _DARK, "width": 1.5},
        hoverinfo="skip",
    )
    many = len(analysis.result.points) > 200
    for arm, (colour, _, symbol) in styles(analysis.result.arms).items():
        for last in (False, True):
            index = [
                i for i, p in enumerate(analysis.result.points) if p.arm == arm and p.last is last
            ]
            if not index:
                continue
            points = [analysis.result.points[i] for i in index]
            size = (8 if last else 5) if not many else 4
            figure.add_scatter(
                x=[p.kl for p in points],
                y=[value(p, front.measure) for p in points],
                error_x=_bars([p.kl_se for p in points], colour, many),
                error_y=_bars([value(p, f"{front.measure}_se") for p in points], colour, many),
                mode="markers",
                name=arm if last else f"{arm}, checkpoints",
                legendgroup=arm,
                marker={
                    "color": colour,
                    "symbol": symbol if last else f"{symbol}-open",
                    "size": size,
                },
                customdata=[[p.run_id] for p in points],
                text=[_hover(analysis, i) for i in index],
                hovertemplate="%{text}<extra></extra>",
            )
    return _laid_out(figure, title_of(front.measure))


def _bars(errors: list[float], colour: str, many: bool) -> dict[str, Any]:
    width = 0 if many else 3
    thin = {"thickness": 0.5 if many else 1, "width": width}
    return {"type": "data", "array": [Z * e for e in errors], "color": colour, **thin}


def _hover(analysis: Analysis, index: int) -> str:
    point, efficiency = analysis.result.points[index], analysis.efficiency[index]
    lines = [
        f"<b>{point.label}</b>, seed {point.seed}, step {point.step}",
        f"KL {point.kl:.3f} ± {Z * point.kl_se:.3f} nats per response",
        f"reward {point.reward:+.3f} ± {Z * point.reward_se:.3f}",
    ]
    if point.judge is not None and point.judge_se is not None:
        lines.append(f"judge {point.judge:+.3f} ± {Z * point.judge_se:.3f}")
    if efficiency is not None and efficiency.known:
        bound = "at most " if efficiency.upper_bound else ""
        bound = "at least " if efficiency.lower_bound else bound
        lines.append(f"{bound}{efficiency.share:.0%} of the optimum's gain at this KL")
    lines.append("click for sample texts")
    return "<br>".join(lines)


def _reference_traces(figure: go.Figure, analysis: Analysis, measure: str) -> None:
    result = analysis.result
    for trusted, dash, name in (
        (True, "solid", "optimum (tilted reference)"),
        (False, "dot", "optimum, too few samples"),
    ):
        curve = [p for p in result.curve("optimal") if p["trusted"] == trusted]
        if not curve:
            continue
        kls = [p["kl"] for p in curve]
        means, errors = np.array([score(p, measure) for p in curve]).T
        if trusted and result.reference is not None:
            kls, means, errors = _from_the_reference(result.reference[measure], kls, means, errors)
            band = np.append(means + Z * errors, (means - Z * errors)[::-1])
            figure.add_scatter(
                x=[*kls, *reversed(kls)],
                y=band,
                fill="toself",
                fillcolor="rgba(120,120,120,0.15)",
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=kls,
            y=means,
            mode="lines",
            name=name,
            line={"color": _GREY, "width": 2, "dash": dash},
            hovertemplate="optimum: %{y:.2f} at %{x:.2f} nats<extra></extra>",
        )
    best = result.curve("best_of_n")
    if not best:
        return
    means, errors = np.array([score(p, measure) for p in best]).T
    figure.add_scatter(
        x=[p["kl_bound"] for p in best],
        y=means,
        error_y={"type": "data", "array": Z * errors, "color": _GREY, "thickness": 1, "width": 2},
        mode="lines+markers",
        name="best of n (at most this KL)",
        line={"color": _GREY, "width": 1, "dash": "dash"},
        marker={"symbol": "line-ns-open", "size": 8, "color": _GREY},
        text=[f"best of {p['n']}" for p in best],
        hovertemplate="%{text}: %{y:.2f} at up to %{x:.2f} nats<extra></extra>",
    )


def _from_the_reference(
    start: float, kls: list[float], means: np.ndarray, errors: np.ndarray
) -> tuple[list[float], np.ndarray, np.ndarray]:
    """The optimum's curve from (0, `start`) on: up to its first point it rises as √KL."""
    root = np.linspace(0, 1, 12)[:-1]
    near = start + root * (means[0] - start)
    return (
        [*(root**2 * kls[0]), *kls],
        np.append(near, means),
        np.append(np.full(len(root), errors[0]), errors),
    )


def interactive_attainment(analysis: Analysis, front: Frontier) -> go.Figure:
    """What half of the seeds of each arm attain within each KL, with its interval over seeds."""
    figure = go.Figure()
    for number, (arm, (colour, _, _)) in enumerate(styles(analysis.result.arms).items()):
        dash = _DASHES[number // len(COLOURS) % len(_DASHES)]  # lines have no markers
        attained = front.attained[arm]
        steps = [kl for kl in front.kls for _ in range(2)][1:]
        _add_band(figure, steps, [e for e in attained for _ in range(2)][:-1], colour, arm)
        figure.add_scatter(
            x=front.kls,
            y=[e.value for e in attained],
            mode="lines",
            line={"shape": "hv", "color": colour, "dash": dash},
            name=arm,
            legendgroup=arm,
            hovertemplate=f"{arm}: %{{y:.2f}} within %{{x:.2f}} nats<extra></extra>",
        )
    return _laid_out(figure, f"{title_of(front.measure)}, attained by half of the seeds")


def interactive_comparison(comparison: Comparison, measure: str) -> go.Figure:
    """Difference of two arms at equal KL, with its interval over seeds."""
    figure = go.Figure()
    _add_band(figure, comparison.kls, comparison.difference, COLOURS[0], "difference")
    figure.add_scatter(
        x=comparison.kls,
        y=[e.value for e in comparison.difference],
        mode="lines",
        line={"color": COLOURS[0]},
        showlegend=False,
        hovertemplate="%{y:+.2f} at %{x:.2f} nats<extra></extra>",
    )
    figure.add_hline(y=0, line={"color": _DARK, "width": 1})
    return _laid_out(figure, f"{measure}: {comparison.first} − {comparison.second}", height=320)


def _add_band(
    figure: go.Figure, kls: list[float], estimates: list[Estimate], colour: str, group: str
) -> None:
    """The intervals of a curve as a band; nothing where there are none."""
    band = [e.ci95 for e in estimates if e.ci95 is not None]
    if len(band) < len(estimates):
        return
    figure.add_scatter(
        x=[*kls, *reversed(kls)],
        y=[*(high for _, high in band), *(low for low, _ in reversed(band))],
        fill="toself",
        opacity=0.2,
        fillcolor=colour,
        line={"width": 0},
        hoverinfo="skip",
        legendgroup=group,
        showlegend=False,
    )


def _laid_out(figure: go.Figure, vertical: str, height: int = 560) -> go.Figure:
    return figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 15, "t": 30, "b": 50},
        xaxis={"title": "KL from the reference, nats per response", "rangemode": "tozero"},
        yaxis={"title": vertical},
        legend={"orientation": "h", "yanchor": "top", "y": -0.14, "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"align": "left"},
    )


# ---- still ---------------------------------------------------------------------------------------


def still_figure(analysis: Analysis) -> Figure:
    """Reward and, beside it, the judge's score against the KL: for a paper."""
    fronts = [f for f in (analysis.reward, analysis.judge) if f is not None]
    figure = Figure(figsize=(5.2 * len(fronts), 4.2), layout="constrained")
    axes = figure.subplots(1, len(fronts), squeeze=False)
    for axis, front in zip(axes[0], fronts, strict=True):
        _draw(axis, analysis, front)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="best")
    return figure


def _draw(axis: Axes, analysis: Analysis, front: Frontier) -> None:
    result = analysis.result
    if result.reference is not None:
        curve = [p for p in result.curve("optimal") if p["trusted"]]
        if curve:  # with few samples of the reference no point of the optimum is known
            means, errors = np.array([score(p, front.measure) for p in curve]).T
            start, kls = result.reference[front.measure], [p["kl"] for p in curve]
            kls, means, errors = _from_the_reference(start, kls, means, errors)
            axis.plot(kls, means, color=_GREY, label="optimum")
            axis.fill_between(
                kls, means - Z * errors, means + Z * errors, color=_GREY, alpha=0.15, lw=0
            )
        if best := result.curve("best_of_n"):
            axis.plot(
                [p["kl_bound"] for p in best],
                [score(p, front.measure)[0] for p in best],
                color=_GREY,
                linestyle="--",
                marker="|",
                label="best of n (at most this KL)",
            )
    kls, scores = front_corners(analysis, front)
    axis.step(kls, scores, where="post", color=_DARK, linewidth=1, label="Pareto front")
    many = len(analysis.result.points) > 200
    for arm, (colour, marker, _) in styles(analysis.result.arms).items():
        points = [p for p in analysis.result.points if p.arm == arm]
        axis.errorbar(
            [p.kl for p in points],
            [value(p, front.measure) for p in points],
            xerr=[Z * p.kl_se for p in points],
            yerr=[Z * value(p, f"{front.measure}_se") for p in points],
            fmt=marker,
            color=colour,
            markersize=2 if many else 4,
            elinewidth=0.3 if many else 0.7,
            label=arm,
        )
    axis.set_xlim(left=0)
    axis.set_xlabel("KL from the reference, nats per response")
    axis.set_ylabel(title_of(front.measure))
    axis.spines[["top", "right"]].set_visible(False)
