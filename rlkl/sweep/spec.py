"""The YAML of a sweep: which recipe, which settings it varies, and how its runs are measured."""

import difflib
import itertools
import json
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

EVALUATED_FIELDS = (
    "model_name_or_path",
    "ref_model_name_or_path",
    "reward_model",
    "positive_label",
    "reward_score",
    "reward_clamp",
    "judge_model",
    "eval_prompts",
    "response_length",
    "temperature",
)
"""Settings of a recipe that define what is measured: one value for all the cells of a sweep."""

OWN_FIELDS = ("output_dir", "seed", "wandb_group", "wandb_run_id", "keep_checkpoints", "config")
"""Settings that the sweep itself gives to a cell."""

STRENGTH = "kl_coef"
"""The field along which one estimator's points make a curve; the others tell estimators apart."""


@dataclass(frozen=True)
class EvaluationSpec:
    """The one evaluator of all cells: same prompts, same draws, same reward model and judge."""

    prompts: int = 128
    """Held-out prompts: the first of the recipe's ``eval_prompts``."""
    responses_per_prompt: int = 4
    """Standard errors are clustered by prompt."""
    reference_samples: int = 256
    """Samples of the reference for each prompt, behind the optimum and best-of-n; 0 for neither."""
    seed: int = 0
    checkpoints: bool = False
    """Measure every checkpoint too (``save_steps``): several points from each run."""
    samples: int = 3
    """Texts kept of each point."""
    script: str | None = None
    """Another evaluator (see `rlkl.sweep.cell` for what is asked of it); None: rlkl's."""


@dataclass(frozen=True)
class SearchSpec:
    """Settings that an Optuna sampler chooses, instead of a grid's fixed values."""

    fields: dict[str, dict[str, Any]]
    """Each ``{low, high, log}``."""
    configurations: int
    """How many are tried in all, in turns over the points of the grid."""
    sampler: str = "tpe"
    """tpe, nsgaii or random; objectives: least KL, most reward."""
    seed: int = 0


@dataclass(frozen=True)
class Configuration:
    """One choice of settings; its seeds are replicas of it."""

    number: int
    arm: str
    """What is compared: the settings that vary, without the strength of the KL."""
    label: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class SweepSpec:
    """A sweep: base recipe, what varies, replicas, evaluator, and bounds on failure."""

    name: str
    recipe: str
    """Path of a script; what is asked of it stands in `rlkl.sweep.cell`."""
    config: str | None = None
    """YAML of base settings for the recipe."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of every cell, over those of `config`."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Axis -> values; a value that is a mapping sets several fields at once."""
    search: SearchSpec | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    retries: int = 2
    """How often a cell that failed is tried again."""
    lost_retries: int = 20
    """How often a cell whose worker vanished is taken over."""
    heartbeat: float = 5.0
    """Seconds between a worker's signs of life."""
    grace: float = 30.0
    """Seconds of silence after which another worker takes the cell over."""
    minutes_per_cell: float | None = None
    """For the estimate of the time before any cell has ended."""

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The points of the grid: every combination of its axes, as settings."""
        points = []
        for values in itertools.product(*self.grid.values()):
            point: dict[str, Any] = {}
            for axis, value in zip(self.grid, values, strict=True):
                point |= value if isinstance(value, Mapping) else {axis: value}
            points.append(point)
        return points

    @property
    def num_configurations(self) -> int:
        """How many configurations there will be in all."""
        return self.search.configurations if self.search else len(self.arms)

    @property
    def num_cells(self) -> int:
        """Runs in all, without the measurement of the reference."""
        return self.num_configurations * len(self.seeds)

    def configuration(self, number: int, searched: Mapping[str, Any] | None = None):
        """The configuration of that number; `searched` are the values a sampler chose."""
        point = self.arms[number % len(self.arms)] | dict(searched or {})
        label = " ".join([self.arm_name(point), *_assignments(point, (STRENGTH,))])
        return Configuration(number, self.arm_name(point), label, {**self.settings, **point})

    def arm_name(self, point: Mapping[str, Any]) -> str:
        """The shortest name that tells a grid point's estimator apart: rb, or rb/both lr=0.001."""
        whole = [{**self.settings, **arm} for arm in self.arms]
        point = {**self.settings, **point}
        searched = self.search.fields if self.search else {}
        varying = [
            name
            for name in dict.fromkeys(name for arm in whole for name in arm)
            if name not in (STRENGTH, "allow_biased_kl", *searched)
            and len({json.dumps(arm.get(name), sort_keys=True) for arm in whole}) > 1
        ]
        different = {tuple(json.dumps(arm.get(n)) for n in varying) for arm in whole}
        estimators = {arm.get("kl_estimator") for arm in whole}
        if len(estimators) == len(different) and point.get("kl_estimator") is not None:
            return str(point["kl_estimator"])
        plain = [n for n in ("kl_estimator", "kl_placement") if n in varying]
        rest = _assignments(point, [n for n in varying if n not in plain])
        return " ".join(["/".join(str(point.get(n)) for n in plain), *rest]).strip() or self.name

    def to_json(self) -> str:
        """As text, for the storage."""
        return json.dumps(asdict(self))  # the order of the axes is that of the cells

    @staticmethod
    def from_json(text: str) -> "SweepSpec":
        """The spec that `to_json` wrote."""
        data = json.loads(text)
        search = data.pop("search")
        return SweepSpec(
            search=SearchSpec(**search) if search else None,
            evaluation=EvaluationSpec(**data.pop("evaluation")),
            **data,
        )


def _assignments(point: Mapping[str, Any], names: Any) -> list[str]:
    """``name=value`` of those that are set; numbers short."""

    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return [f"{name}={short(point[name])}" for name in names if name in point]


def load_spec(path: str | Path) -> SweepSpec:
    """Reads and checks a sweep's YAML, every cell's settings by the recipe's own parser.

    Raises:
        FileNotFoundError: the spec, its recipe or its base config is not there.
        ValueError: an unknown key or setting, a value that the recipe refuses, an empty axis, a
            setting that would change the measurement from cell to cell.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such sweep: {path}")
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no mapping; it needs at least recipe, grid and seeds")
    data = {"name": path.stem, **data}
    _refuse_unknown(data, _names(SweepSpec), str(path))
    if "recipe" not in data:
        raise ValueError(f"{path} names no recipe: the path of the script that a cell runs")
    data["recipe"] = str(_beside(path, data["recipe"], "recipe"))
    evaluation = data.get("evaluation") or {}
    _refuse_unknown(evaluation, _names(EvaluationSpec), "evaluation")
    if evaluation.get("script"):
        evaluation["script"] = str(_beside(path, evaluation["script"], "evaluation.script"))
    base: dict[str, Any] = {}
    if data.get("config"):
        config = _beside(path, data["config"], "config")
        base, data["config"] = yaml.safe_load(config.read_text()), str(config)
    data["settings"] = {k: v for k, v in base.items() if k not in OWN_FIELDS} | (
        data.get("settings") or {}
    )
    search = data.pop("search", None)
    spec = SweepSpec(
        **{k: v for k, v in data.items() if k != "evaluation"},
        evaluation=EvaluationSpec(**evaluation),
        search=_search(search) if search else None,
    )
    _check_shape(spec)
    return _checked_by_recipe(spec)


def _beside(spec: Path, name: str, what: str) -> Path:
    file = (spec.parent / Path(name).expanduser()).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{what}: no such file: {file} (paths start at the spec's folder)")
    return file


def _search(data: dict[str, Any]) -> SearchSpec:
    """``{configurations, sampler, seed, <field>: {low, high, log}}``."""
    own = {k: v for k, v in data.items() if k in ("configurations", "sampler", "seed")}
    ranges = {k: v for k, v in data.items() if k not in own}
    if not ranges or not isinstance(own.get("configurations"), int) or own["configurations"] < 1:
        raise ValueError("search needs configurations: N and a range, such as kl_coef: {low, high}")
    if own.get("sampler", "tpe") not in ("tpe", "nsgaii", "random"):
        raise ValueError(f"search.sampler is {own['sampler']!r}; use tpe, nsgaii or random")
    for name, limits in ranges.items():
        if not isinstance(limits, dict) or not {"low", "high"} <= limits.keys():
            raise ValueError(f"search.{name} is {limits!r}; give {{low: , high: , log: true}}")
        _refuse_unknown(limits, ["low", "high", "log"], f"search.{name}")
        if not limits["low"] < limits["high"] or (limits.get("log") and limits["low"] <= 0):
            raise ValueError(f"search.{name} is {limits!r}; low < high, and low > 0 where log")
    return SearchSpec(fields=ranges, **own)


def _check_shape(spec: SweepSpec) -> None:
    for axis, values in spec.grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{axis} is {values!r}; give a list of values")
    for name, value in (("seeds", spec.seeds), ("evaluation.prompts", [spec.evaluation.prompts])):
        if not value or not all(isinstance(x, int) and x >= 0 for x in value):
            raise ValueError(f"{name} is {value!r}; whole numbers >= 0 are needed")
    if len(set(spec.seeds)) < len(spec.seeds):
        raise ValueError(f"seeds are {spec.seeds}; a seed stands twice")
    if spec.grace <= 2 * spec.heartbeat:
        raise ValueError(
            f"grace is {spec.grace} s and heartbeat {spec.heartbeat} s; a worker must be able to "
            "miss a beat: use a grace of more than two heartbeats"
        )
    points = [json.dumps(arm, sort_keys=True) for arm in spec.arms]
    if len(set(points)) < len(points):
        raise ValueError("two points of the grid are the same")


def recipe_settings(recipe: str) -> tuple[type, ...]:
    """The dataclasses of a recipe's settings: what it declares as ``SETTINGS``.

    Raises:
        ValueError: it declares none.
    """
    declared = runpy.run_path(recipe, run_name="rlkl.sweep.spec").get("SETTINGS")
    if not declared:
        raise ValueError(
            f"{recipe} declares no SETTINGS (a tuple of the dataclasses it reads), so that a sweep "
            "could check its cells before they start"
        )
    return tuple(declared)


def _checked_by_recipe(spec: SweepSpec) -> SweepSpec:
    """The spec, once the recipe's parser has taken the settings of every configuration.

    The measurement's settings come back with the recipe's defaults filled in.
    """
    classes = recipe_settings(spec.recipe)
    known = [name for cls in classes for name in _names(cls)]
    where = Path(spec.recipe).name
    _refuse_unknown(spec.settings, known, f"settings of {where}")
    searched = spec.search.fields if spec.search else {}
    varied = {name for arm in spec.arms for name in arm} | set(searched)
    _refuse_unknown(dict.fromkeys(varied), known, f"grid for {where}")
    for name in sorted(varied | set(spec.settings)):
        if name in OWN_FIELDS:
            raise ValueError(f"{name} is given to each cell by the sweep (seeds: for seeds)")
    for name in sorted(varied):
        if name in EVALUATED_FIELDS:
            raise ValueError(
                f"{name} cannot be varied: it defines what is measured, which must be the same "
                "for all cells; put it under settings"
            )
    if spec.evaluation.checkpoints and "keep_checkpoints" not in known:
        raise ValueError(f"evaluation.checkpoints needs a recipe that can keep them; {where} can't")
    filled: dict[str, Any] = {}
    lows = {name: limits["low"] for name, limits in searched.items()}
    for number in range(len(spec.arms)):
        configuration = spec.configuration(number, lows)
        for parsed in _parse(classes, configuration):
            filled |= {
                name: getattr(parsed, name) for name in EVALUATED_FIELDS if hasattr(parsed, name)
            }
        _check_estimator(configuration)
    values = asdict(spec) | {"settings": {**spec.settings, **filled}}
    return SweepSpec.from_json(json.dumps(values))


def _parse(classes: tuple[type, ...], configuration: Configuration) -> tuple[Any, ...]:
    from trl import TrlParser  # slow to import, and not needed by workers

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{configuration.label}: {message}")

    parser = Parser(classes)  # pyright: ignore[reportArgumentType]
    own = {"output_dir": "runs"} if any("output_dir" in _names(c) for c in classes) else {}
    unknown = parser.set_defaults_with_config(**configuration.settings, **own)
    if unknown:
        raise ValueError(f"{configuration.label}: unknown {unknown[0]}")
    return parser.parse_args_into_dataclasses(args=[])


def _check_estimator(configuration: Configuration) -> None:
    """Refuses here the pairs that the trainer would refuse in every cell."""
    from rlkl.kl import KLPlacement, check_placement, get_estimator  # torch: not for workers

    estimator = configuration.settings.get("kl_estimator")
    placement = configuration.settings.get("kl_placement")
    if estimator is not None:
        found = get_estimator(estimator)
        if placement is not None:
            allow = bool(configuration.settings.get("allow_biased_kl"))
            check_placement(found, KLPlacement(placement), allow)


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _refuse_unknown(given: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: unknown field {name!r}{hint}")


def iterate_cells(spec: SweepSpec) -> Iterator[tuple[Configuration, int]]:
    """Configuration and seed of every cell of a grid, in the order in which they are run.

    One seed of every configuration comes before the second of any, so that a sweep that is looked
    at early shows whole curves.
    """
    for seed in spec.seeds:
        for number in range(spec.num_configurations):
            yield spec.configuration(number), seed
