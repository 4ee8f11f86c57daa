"""What a sweep has measured, as flat records: one a point, with the configuration it came from."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkl.sweep.algorithms import ALGORITHMS
from rlkl.sweep.fields import not_finite
from rlkl.sweep.ledger import REFERENCE, Ledger
from rlkl.sweep.spec import STRENGTH, SearchSpec, SweepSpec


@dataclass(frozen=True)
class Point:
    """One policy, measured: KL in nats per response, reward and judge in their own units."""

    run_id: str
    arm: str
    """Which estimator, placement or other settings: what is compared."""
    label: str
    configuration: int
    seed: int
    kl_coef: float
    step: int
    last: bool
    """Whether it is the end of its run; the others are checkpoints on the way."""
    kl: float
    kl_se: float
    reward: float
    reward_se: float
    judge: float | None = None
    judge_se: float | None = None
    seconds: float = 0.0
    algorithm: str | None = None
    """The command that trained it; None: a recipe of the user's, or a record that does not say."""
    estimator: str | None = None
    placement: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the evaluator measured."""
    measured: dict[str, Any] = field(default_factory=dict)
    """How, by the evaluator: prompts, lengths, temperature, scores; empty where a record does not
    say."""


@dataclass(frozen=True)
class MissingCell:
    """A cell of a sweep that has no point: it failed, is running or has not begun."""

    arm: str
    label: str
    seed: int
    measured: bool
    """Whether its configuration has points of other seeds."""


@dataclass(frozen=True)
class SweepResult:
    """Everything a report is made of."""

    name: str
    points: list[Point]
    reference: dict[str, Any] | None
    """Reward of the reference; its judge, ``optimal`` and ``best_of_n`` where the evaluator gives
    them."""
    samples: dict[str, list[dict[str, Any]]]
    """Texts by run."""
    failed: dict[str, str]
    """Failed cells with their notes."""
    spec: dict[str, Any]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError(
                f"the records of {self.name} hold no points: none of its runs was done. Go on with "
                "it by `rlkl sweep run SPEC`, and report it again"
            )
        ends = Counter(point.run_id for point in self.ends)
        runs: dict[tuple[int, int], str] = {}
        for point in self.points:
            if ends[point.run_id] != 1:
                raise ValueError(
                    f"run {point.run_id} has {ends[point.run_id]} points that end it (last: true); "
                    "one is needed"
                )
            other = runs.setdefault((point.configuration, point.seed), point.run_id)
            if other != point.run_id:
                raise ValueError(
                    f"{other} and {point.run_id} are both configuration {point.configuration}, "
                    f"seed {point.seed}: one run of each is needed"
                )

    @property
    def arms(self) -> list[str]:
        """What is compared, in the order of the grid."""
        return list(
            dict.fromkeys(p.arm for p in sorted(self.points, key=lambda p: p.configuration))
        )

    @property
    def algorithms(self) -> list[str]:
        """What trained the runs, as far as it is known, in the order of the grid."""
        runs = sorted(self.points, key=lambda p: p.configuration)
        return list(dict.fromkeys(p.algorithm for p in runs if p.algorithm is not None))

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The ways in which runs and reference were measured, as far as the records say; numbers
        of two ways do not compare.
        """
        ways: list[dict[str, Any]] = []
        for way in [*(p.measured for p in self.points), (self.reference or {}).get("measured")]:
            if way and way not in ways:
                ways.append(way)
        return ways

    @property
    def response_lengths(self) -> dict[int, list[str]]:
        """The arms by the tokens at which their responses were cut; empty where no record says."""
        arms: dict[int, list[str]] = {}
        said = self.spec.get("settings", {}).get("response_length")
        for point in sorted(self.points, key=lambda p: p.configuration):
            length = point.measured.get("response_length", said)
            if length is not None and point.arm not in arms.setdefault(length, []):
                arms[length].append(point.arm)
        return arms

    @property
    def ends(self) -> list[Point]:
        """The points at the ends of the runs."""
        return [point for point in self.points if point.last]

    def curve(self, name: str) -> list[dict[str, Any]]:
        """Points of the reference's ``optimal`` or ``best_of_n``; none where it has no such."""
        return (self.reference or {}).get(name, [])

    @property
    def missing(self) -> list[MissingCell]:
        """The cells without a point, by configuration.

        A sweep's cells are what its spec says; where the records hold no grid, every configuration
        that has a point with every seed that has one.
        """
        measured = {p.configuration: (p.arm, p.label) for p in self.points}
        names, seeds = dict(measured), sorted({p.seed for p in self.points})
        if "grid" in self.spec:
            search = self.spec.get("search")
            what = {n: self.spec[n] for n in ("recipe", "algorithm", "defaults") if n in self.spec}
            spec = SweepSpec(
                name=self.name,
                settings=self.spec.get("settings", {}),
                grid=self.spec["grid"],
                search=SearchSpec(**search) if search else None,
                **what,
            )
            seeds = self.spec["seeds"]
            for configuration in map(spec.configuration, range(spec.num_configurations)):
                label = configuration.label
                if search:  # which values it will have is not chosen yet
                    label += f" (configuration {configuration.number})"
                names.setdefault(configuration.number, (configuration.arm, label))
        there = {(p.configuration, p.seed) for p in self.points}
        return [
            MissingCell(*names[number], seed, number in measured)
            for number in sorted(names)
            for seed in seeds
            if (number, seed) not in there
        ]

    def save(self, path: Path) -> None:
        """Writes records as JSON lines: the sweep itself first, then a line a point."""
        head = {k: v for k, v in vars(self).items() if k != "points"}
        rows = [{"sweep": head}, *(vars(point) for point in self.points)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "SweepResult":
        """What `save` wrote.

        Raises:
            ValueError: the file is not one of ours, a line of it is cut, it counts a run twice, or
                it holds no points.
        """
        text = Path(path).read_text(encoding="utf-8")
        # Not splitlines: a text may hold U+0085 or U+2028 as they are, which end a line for it.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, record {number} is not JSON: {error}") from error
        if not rows or not all(isinstance(row, dict) for row in rows) or "sweep" not in rows[0]:
            raise ValueError(f"{path} holds no sweep's records (its first line names none)")
        if len(set(lines)) < len(lines):
            raise ValueError(f"{path} holds a line twice; each measurement must stand there once")
        head, *measured = rows
        if any("sweep" in row for row in measured):
            raise ValueError(f"{path} holds two sweeps; report each from a file of its own")
        for number, row in enumerate(measured, 2):
            _check_point(row, f"{path}, record {number}")
        try:
            return SweepResult(points=[Point(**row) for row in measured], **head["sweep"])
        except TypeError as error:  # a field too many, or one that is missing
            raise ValueError(f"{path} holds other records than this version's: {error}") from error


def check_record(record: Any, reference: bool) -> None:
    """Refuses what is no measurement of a cell.

    Raises:
        ValueError: no points, a point without its numbers, a number that is not finite, or samples
            and curves that a report could not show.
    """
    name, kind = ("reference", dict) if reference else ("points", list)
    found = record.get(name) if isinstance(record, dict) else None
    if not found or not isinstance(found, kind):
        raise ValueError(f"the evaluator wrote no {name}")
    if reference:
        _check_numbers(found, ("reward",), "reference")
        for curve, needed in _CURVES.items():
            _check_rows(record[name].get(curve, []), needed, f"reference.{curve}")
        if record[name].get("optimal"):  # what the page says of it
            _check_numbers(found, ("samples", "trusted_kl"), "reference")
    else:
        for number, point in enumerate(found):
            _check_point(point, f"points[{number}]")
    _check_rows(record.get("samples", []), ("reward",), "samples")
    for name in ("versions", "measured"):
        if not isinstance(record.get(name, {}), dict):
            raise ValueError(f"{name} is {record[name]!r}; a mapping is needed")
    for place in not_finite(record, ""):
        raise ValueError(f"the evaluator measured that {place.lstrip('.')}")


def _check_point(point: Any, where: str) -> None:
    if not isinstance(point, dict):
        raise ValueError(f"{where} is no mapping")
    _check_numbers(point, _NEEDED if point.get("judge") is None else _MEASURED, where)


def _check_rows(rows: Any, needed: Sequence[str], where: str) -> None:
    if not isinstance(rows, list):
        raise ValueError(f"{where} is no list")
    for number, row in enumerate(rows):
        _check_numbers(row, needed, f"{where}[{number}]")


def _check_numbers(found: Any, needed: Sequence[str], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no mapping")
    for key in needed:
        value = found.get(key)
        if not isinstance(value, int | float) or (isinstance(value, bool) and key != "trusted"):
            raise ValueError(f"{where} has no number {key}")
        if key.endswith("_se") and value < 0:
            raise ValueError(f"{where}.{key} is {value}; a standard error is at least 0")


_CURVES = {
    "optimal": ("kl", "reward", "reward_se", "trusted"),
    "best_of_n": ("n", "kl_bound", "reward", "reward_se"),
}
_NEEDED = ("step", "kl", "kl_se", "reward", "reward_se")
_MEASURED = (*_NEEDED, "judge", "judge_se")


def collect(ledger: Ledger) -> SweepResult:
    """The records of all cells that are done.

    Raises:
        ValueError: no cell is done yet.
    """
    points: list[Point] = []
    samples: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, str] = {}
    reference = None
    cells = ledger.cells()
    for cell in cells:
        if cell.state != "done" or cell.record is None:
            continue
        versions |= cell.record.get("versions", {})
        how = cell.record.get("measured", {})
        if cell.key == REFERENCE:
            reference = cell.record["reference"] | ({"measured": how} if how else {})
            continue
        algorithm = ledger.spec.algorithm_of(cell.settings)
        settings = cell.settings
        if algorithm is not None:
            settings = {**ALGORITHMS[algorithm].fixed, **settings}
        samples[cell.key] = cell.record.get("samples", [])
        measured: Sequence[dict[str, Any]] = cell.record["points"]
        for measurement in measured:
            points.append(
                Point(
                    run_id=cell.key,
                    arm=cell.arm,
                    label=cell.label,
                    configuration=cell.configuration,
                    seed=cell.seed,
                    kl_coef=float(settings.get(STRENGTH, 0.0)),
                    last=measurement is measured[-1],
                    seconds=round(cell.seconds, 1),
                    algorithm=algorithm,
                    estimator=settings.get("kl_estimator"),
                    placement=settings.get("kl_placement"),
                    extra={k: v for k, v in measurement.items() if k not in _MEASURED},
                    measured=how,
                    **{k: measurement[k] for k in _MEASURED if k in measurement},
                )
            )
    if not points:
        raise ValueError(
            f"no cell of {ledger.name} is done yet: nothing to report. `rlkl sweep status` says "
            "how they are, `rlkl sweep run` goes on with them"
        )
    failed = {cell.key: cell.error or "" for cell in cells if cell.state == "failed"}
    spec = json.loads(ledger.spec.to_json())
    for name in ("recipe", "config"):  # where they lie on this machine says nothing to others
        spec[name] = spec[name] and Path(spec[name]).name
    script = spec["evaluation"]["script"]
    spec["evaluation"]["script"] = script and Path(script).name
    return SweepResult(ledger.name, points, reference, samples, failed, spec, versions)
