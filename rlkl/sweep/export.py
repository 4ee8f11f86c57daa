"""A sweep's results for programs: one JSON record, and a CSV with a line a point."""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkl.sweep.analysis import (
    Comparison,
    Efficiency,
    Frontier,
    OverOptimisation,
    configuration_means,
    efficiencies,
    frontier,
    over_optimisation,
)
from rlkl.sweep.records import SweepResult


@dataclass(frozen=True)
class Analysis:
    """Everything that the report, the JSON and W&B show, computed once."""

    result: SweepResult
    reward: Frontier
    judge: Frontier | None
    efficiency: list[Efficiency | None]
    over_optimised: dict[str, OverOptimisation | None]
    means: list[dict[str, Any]]


def analyse(result: SweepResult, resamples: int = 500) -> Analysis:
    """Analyses a sweep by its reward and, where every point and the reference have one, by its
    judge's score.
    """
    judged = all(point.judge is not None and point.judge_se is not None for point in result.points)
    judged = judged and (result.reference is None or "judge" in result.reference)
    return Analysis(
        result=result,
        reward=frontier(result, "reward", resamples),
        judge=frontier(result, "judge", resamples) if judged else None,
        efficiency=efficiencies(result),
        over_optimised=over_optimisation(result) if judged else {},
        means=configuration_means(result),
    )


def point_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """One flat record a point."""
    rows = []
    for index, point in enumerate(analysis.result.points):
        nested = ("extra", "measured")
        row = {k: v for k, v in vars(point).items() if k not in nested} | point.extra
        row["on_front"] = analysis.reward.on_front[index]
        if analysis.judge is not None:
            row["on_judge_front"] = analysis.judge.on_front[index]
        efficiency = analysis.efficiency[index]
        if efficiency is not None:
            row["efficiency"], row["efficiency_se"] = efficiency.share, efficiency.stderr
            row["efficiency_is_upper_bound"] = efficiency.upper_bound
            row["efficiency_is_lower_bound"] = efficiency.lower_bound
        rows.append(row)
    return rows


def frontier_json(analysis: Analysis) -> dict[str, Any]:
    """The record of ``rlkl sweep frontier --json``.

    ``points``, ``share_on_front`` by arm, ``share_on_front_ci95``, ``hypervolume`` (each {value,
    ci95}), ``hypervolume_difference``, ``reference_point`` [KL, reward], ``optimal`` [[KL, reward],
    …], ``optimal_trusted`` (whether the samples carry each of these), ``best_of_n`` [[n, KL bound,
    reward], …], ``comparisons`` at equal KL, ``over_optimisation``, under ``judge`` the same by the
    judge's score, ``failed`` with notes, ``missing`` [{label, seed}, …]: cells without a
    measurement, and ``measured``: how (one mapping where all cells were measured alike). An arm
    that lacks a run of one of its configurations has no hypervolume.
    """
    points = [{"kl_nats": row.pop("kl"), **row} for row in point_rows(analysis)]
    record = {"name": analysis.result.name, "points": points}
    record |= _measure(analysis, analysis.reward)
    if analysis.judge is not None:
        record["judge"] = _measure(analysis, analysis.judge)
    record["over_optimisation"] = {
        arm: None if found is None else asdict(found)
        for arm, found in analysis.over_optimised.items()
    }
    record["failed"] = analysis.result.failed
    record["missing"] = [{"label": c.label, "seed": c.seed} for c in analysis.result.missing]
    record["measured"] = analysis.result.measured
    return record


def _measure(analysis: Analysis, front: Frontier) -> dict[str, Any]:
    result = analysis.result
    return {
        "share_on_front": {arm: e.value for arm, e in front.share_on_front.items()},
        "share_on_front_ci95": {
            arm: e.as_json()["ci95"] for arm, e in front.share_on_front.items()
        },
        "hypervolume": {arm: e.as_json() for arm, e in front.hypervolume.items()},
        "hypervolume_difference": {
            f"{a} - {b}": e.as_json() for (a, b), e in front.hypervolume_difference.items()
        },
        "reference_point": list(front.reference_point),
        "attainment": {arm: [list(c) for c in s] for arm, s in front.surfaces.items()},
        "comparisons": [_comparison(c) for c in front.comparisons],
        "optimal": [[p["kl"], score(p, front.measure)[0]] for p in result.curve("optimal")],
        "optimal_trusted": [p["trusted"] for p in result.curve("optimal")],
        "best_of_n": [
            [p["n"], p["kl_bound"], score(p, front.measure)[0]] for p in result.curve("best_of_n")
        ],
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "first": comparison.first,
        "second": comparison.second,
        "mean_difference": comparison.mean.as_json(),
        "kl": comparison.kls,
        "difference": [e.as_json() for e in comparison.difference],
    }


def score(point: dict[str, Any], measure: str) -> tuple[float, float]:
    """Reward or judge of a point of a reference curve, with its standard error."""
    if measure == "reward":
        return point["reward"], point["reward_se"]
    mean, stderr = point["others"][measure]
    return mean, stderr


def write_csv(analysis: Analysis, path: Path) -> None:
    """One line a point."""
    rows = point_rows(analysis)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
