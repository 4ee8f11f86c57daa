"""A sweep in sentences: what its page, its W&B summary and the command line say of it."""

import json
from collections.abc import Iterator
from itertools import combinations, groupby
from typing import Any

from rlkl.sweep.analysis import Comparison, Efficiency, Frontier
from rlkl.sweep.export import Analysis
from rlkl.sweep.frontier import Estimate
from rlkl.sweep.records import Point, SweepResult

NAMED = 8
"""How many of their kind are named at most: configurations that are missing, pairs of arms."""


def findings(analysis: Analysis) -> list[dict[str, Any]]:
    """The sweep in sentences, most important first; `warn` marks what should not be overlooked."""
    result, front = analysis.result, analysis.reward
    lines: list[dict[str, Any]] = []

    def say(text: str, warn: bool = False) -> None:
        lines.append({"text": text, "warn": warn})

    for text in _mixed(result):
        say(text, warn=True)
    if result.missing:
        say(_missing(analysis), warn=True)
    pairs = len(front.comparisons)
    several = pairs > NAMED
    differing = [c for c in front.comparisons if _differs(c)]
    if several and not any(c.mean.ci95 for c in front.comparisons):
        say(f"{pairs} pairs are compared at equal KL in the table, without intervals.")
    elif several:
        say(
            f"At equal KL {len(differing)} of {pairs} pairs differ by an interval that does not "
            f"hold 0; were all equal, about {0.05 * pairs:.0f} would by chance. The table has them "
            "all; here the largest."
        )
        differing.sort(key=lambda c: -abs(c.mean.value))
    for comparison in differing[:NAMED] if several else front.comparisons:
        say(_said(comparison))
    compared = {(comparison.first, comparison.second) for comparison in front.comparisons}
    apart = [pair for pair in combinations(result.arms, 2) if pair not in compared]
    if apart:
        named = ", ".join(f"{first} and {second}" for first, second in apart[:NAMED])
        more = f"; and {len(apart) - NAMED} more pairs" if len(apart) > NAMED else ""
        say(f"Not compared at equal KL, as they have no range of KL in common: {named}{more}.")
    if len(result.arms) > 1:
        say(_shares(front))
    for arm, found in analysis.over_optimised.items():
        if found is None:
            continue
        said, judged, so = (
            ("Over-optimisation", "falls", "Beyond, the reward says less than it seems")
            if found.judge_falls
            else ("Over-optimisation perhaps", "does not rise", "That the judge falls is not shown")
        )
        say(
            f"{said}: with {arm}, from {found.from_kl:.2f} nats on the reward still rises (by "
            f"{found.reward_rise:.2f} up to {found.to_kl:.2f} nats) while the judge {judged} "
            f"({found.judge_change:+.2f}). {so} (Gao et al., 2022).",
            warn=True,
        )
    unseen = [arm for arm, found in analysis.over_optimised.items() if found is None]
    if unseen:
        most = max(p.kl for p in result.points)
        say(
            f"No over-optimisation seen up to {most:.2f} nats with {', '.join(unseen)}: beyond the "
            "configuration that the judge likes best, none has more reward by a t-test (2.5%). No "
            "other configurations were compared."
        )
    ends = [
        (e, p)
        for e, p in zip(analysis.efficiency, result.points, strict=True)
        if e is not None and p.last
    ]
    reached = [(e, p) for e, p in ends if not (e.upper_bound or e.lower_bound)]
    beyond = [e.share for e, _ in ends if e.upper_bound]
    lost = sum(e.lower_bound for e, _ in ends)
    if reached:
        known = max(p["kl"] for p in result.curve("optimal") if p["trusted"])
        say(
            f"Where the optimum is known, up to {known:.2f} nats, {_best_of(reached)}"
            + (
                f" Of the {len(beyond)} runs beyond only upper bounds are known, the least "
                f"{min(beyond):.0%}"
                + (" (100% and more say nothing)." if max(beyond) >= 1 else ".")
                if beyond
                else ""
            )
            + (f" {lost} runs beyond have less reward than the reference." if lost else "")
        )
    if result.response_lengths:
        say(_cut(result))
    seeds = {p.seed for p in result.points}
    if len(seeds) < 3:
        say(
            f"Only {len(seeds)} seed{'s' * (len(seeds) > 1)}: "
            + (
                "no interval over seeds can be given."
                if len(seeds) == 1
                else "intervals are rough."
            ),
            warn=True,
        )
    if result.failed:
        say(f"{len(result.failed)} cells failed and are missing here.", warn=True)
    return lines


def _cut(result: SweepResult) -> str:
    """Of what responses the KL is: that of whole ones is never smaller."""
    shares = [p.extra["truncated"] for p in result.ends if "truncated" in p.extra]
    cut = ""
    if shares:
        cut = f", as {min(shares):.0%} to {max(shares):.0%} of a run's were"
    return (
        f"KL is that of responses cut at {cut_at(result)}{cut}: that of whole responses is the "
        "same or larger."
    )


def cut_at(result: SweepResult) -> str:
    """The tokens at which responses were cut; with the arms where they differ."""
    arms = result.response_lengths
    if len(arms) == 1:
        return f"{next(iter(arms))} tokens"
    return " or ".join(f"{length} tokens ({', '.join(of)})" for length, of in sorted(arms.items()))


def _best_of(runs: list[tuple[Efficiency, Point]]) -> str:
    """The run that is surely nearest to the optimum: by the lower end of its interval."""
    known = [(e, p) for e, p in runs if e.known]
    if not known:
        return (
            f"no share of the possible gain can be told of the {len(runs)} runs: their rewards' "
            "errors are too large beside it. More evaluation.prompts make them smaller."
        )
    best, point = max(known, key=lambda pair: pair[0].share - 1.96 * pair[0].stderr)
    unknown = f" ({len(runs) - len(known)} too uncertain to tell)" if len(runs) > len(known) else ""
    return (
        f"the best of {len(runs)} runs{unknown} reaches {best.share:.0%} ± "
        f"{1.96 * best.stderr:.0%} of the gain that is possible at its KL ({point.label}, seed "
        f"{point.seed}, {point.kl:.2f} nats)."
    )


def _shares(front: Frontier) -> str:
    """Each arm's share of the front; those whose interval holds every share are said together."""
    shares = front.share_on_front
    wide = [arm for arm, e in shares.items() if e.ci95 is not None and e.ci95 == (0.0, 1.0)]
    said = ", ".join(
        f"{arm} {e.value:.0%}" if arm in wide else f"{arm} {percent(e)}"
        for arm, e in shares.items()
    )
    if len(wide) == len(shares):
        said += "; the seeds leave it open, every interval is from 0% to 100%"
    elif wide:
        said += f"; of {', '.join(wide)} the seeds leave it open, from 0% to 100%"
    return f"Share of the reward-vs-KL front: {said}."


def _mixed(result: SweepResult) -> Iterator[str]:
    """What keeps the numbers from being compared: measurements of several kinds, or of none known.

    Records of one kind, or all of them from before it was recorded, are not spoken of.
    """
    ways = result.measured
    names = dict.fromkeys(name for way in ways for name in way)
    different = []
    for name in names:
        values = dict.fromkeys(json.dumps(way.get(name)) for way in ways)
        if len(values) > 1:
            different.append(f"{name} is {' or '.join(values)}")
    if different:
        yield (
            f"These numbers do not compare: they were measured in {len(ways)} ways "
            f"({'; '.join(different)}). Measure all cells alike, in a sweep of another name."
        )
    unsaid = len({p.run_id for p in result.points if not p.measured})
    if ways and unsaid:
        yield (
            f"{unsaid} of {len(result.ends)} runs do not say how they were measured, being older "
            "records: whether they compare with the others is not known."
        )


def missing_runs(result: SweepResult) -> list[str]:
    """The cells without a measurement, a line a configuration: ``rb kl_coef=0.1: seeds 1, 2``."""
    seeds: dict[str, list[str]] = {}
    for cell in result.missing:
        seeds.setdefault(cell.label, []).append(str(cell.seed))
    return [f"{at}: seed{'s' * (len(s) > 1)} {', '.join(s)}" for at, s in seeds.items()]


def _missing(analysis: Analysis) -> str:
    result = analysis.result
    runs = missing_runs(result)
    more = f"; and {len(runs) - NAMED} more configurations" if len(runs) > NAMED else ""
    cells = len(result.missing) + len({p.run_id for p in result.points})
    part = [arm for arm in result.arms if arm not in analysis.reward.hypervolume]
    volumes = f" No hypervolume of {', '.join(part)}: some configurations have no run."
    return (
        f"{len(result.missing)} of {cells} cells are missing ({'; '.join(runs[:NAMED])}{more}). "
        "Shares of the front count the runs that there are, and intervals need two seeds of every "
        f"configuration.{volumes if part else ''}"
    )


def _differs(comparison: Comparison) -> bool:
    """Whether the interval of the mean difference does not hold 0."""
    ci95 = comparison.mean.ci95
    return ci95 is not None and (ci95[0] > 0 or ci95[1] < 0)


def _said(comparison: Comparison) -> str:
    more, less, mean = comparison.first, comparison.second, comparison.mean
    if mean.value < 0:
        more, less = less, more
        ci95 = None if mean.ci95 is None else (-mean.ci95[1], -mean.ci95[0])
        mean = Estimate(-mean.value, ci95)
    verdict = ""
    if mean.ci95 is not None and mean.ci95[0] <= 0:
        verdict = f" The interval holds 0: no difference is shown.{_apart(comparison)}"
    return (
        f"At equal KL, from {comparison.kls[0]:.2f} to {comparison.kls[-1]:.2f} nats, {more} has "
        f"{signed(mean)} reward over {less}.{verdict}"
    )


def _apart(comparison: Comparison) -> str:
    """Where the arms differ all the same: the longest row of KLs whose intervals do not hold 0.

    Rows of one or two say nothing: each interval leaves 0 by chance in one case of twenty. Longer
    ones say little more, for neighbouring KLs rest on the same runs.
    """
    points = [
        (kl, e.value, (e.ci95[0] > 0) - (e.ci95[1] < 0))
        for kl, e in zip(comparison.kls, comparison.difference, strict=True)
        if e.ci95 is not None
    ]
    rows = [list(row) for sign, row in groupby(points, lambda point: point[2]) if sign]
    row = max(rows, key=len, default=[])
    if len(row) < 3:
        return ""
    ahead = comparison.first if row[0][2] > 0 else comparison.second
    return (
        f" But KL by KL, the intervals from {row[0][0]:.2f} to {row[-1][0]:.2f} nats do not: there "
        f"{ahead} is ahead, by up to {max(abs(value) for _, value, _ in row):.2f}. Each of these "
        "intervals stands by itself, and equal arms show such a row now and then: a hint."
    )


def percent(estimate: Estimate) -> str:
    """A share with its interval: 80% [60%, 95%]."""
    if estimate.ci95 is None:
        return f"{estimate.value:.0%}"
    return f"{estimate.value:.0%} [{estimate.ci95[0]:.0%}, {estimate.ci95[1]:.0%}]"


def plain(estimate: Estimate) -> str:
    """A size with its interval."""
    if estimate.ci95 is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.ci95[0]:.2f}, {estimate.ci95[1]:.2f}]"


def signed(estimate: Estimate) -> str:
    """A difference with its interval, signs written."""
    if estimate.ci95 is None:
        return f"{estimate.value:+.2f}"
    return f"{estimate.value:+.2f} [{estimate.ci95[0]:+.2f}, {estimate.ci95[1]:+.2f}]"
