"""The YAML of a sweep: which recipe, which settings it varies, and how its runs are measured."""

import itertools
import json
import runpy
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import yaml

from rlkl.sweep.fields import Above, AtLeast, check_fields, check_number, not_finite, refuse_unknown

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
    "max_prompt_length",
)
"""Settings of a recipe that define what is measured: one value for all the cells of a sweep."""

OWN_FIELDS = ("output_dir", "seed", "wandb_group", "wandb_run_id", "wandb_arm")
OWN_FIELDS += ("keep_checkpoints", "config")
"""Settings that the sweep itself gives to a cell."""

STRENGTH = "kl_coef"
"""The field along which one estimator's points make a curve; the others tell estimators apart."""


@dataclass(frozen=True)
class EvaluationSpec:
    """The one evaluator of all cells: same prompts, same draws, same reward model and judge."""

    prompts: Annotated[int, AtLeast(2)] = 128
    """Held-out prompts: the first of the recipe's ``eval_prompts``, all where it has fewer."""
    responses_per_prompt: Annotated[int, AtLeast(1)] = 4
    """Standard errors are clustered by prompt."""
    reference_samples: Annotated[int, AtLeast(0)] = 256
    """Samples of the reference for each prompt, behind the optimum and best-of-n; 0 for neither."""
    seed: Annotated[int, AtLeast(0)] = 0
    checkpoints: bool = False
    """Measure every checkpoint too (``save_steps``): several points from each run."""
    samples: Annotated[int, AtLeast(0)] = 3
    """Texts kept of each point."""
    script: str | None = None
    """Another evaluator (see `rlkl.sweep.cell` for what is asked of it); None: rlkl's."""


@dataclass(frozen=True)
class SearchSpec:
    """Settings that an Optuna sampler chooses, instead of a grid's fixed values."""

    fields: dict[str, dict[str, Any]]
    """Each ``{low, high, log}``."""
    configurations: Annotated[int, AtLeast(1)]
    """How many are tried in all, in turns over the points of the grid."""
    sampler: str = "tpe"
    """tpe, nsgaii or random; objectives: least KL, most reward."""
    seed: Annotated[int, AtLeast(0)] = 0


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
    seeds: list[Annotated[int, AtLeast(0)]] = field(default_factory=lambda: [0])
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    retries: Annotated[int, AtLeast(0)] = 2
    """How often a cell that failed is tried again."""
    lost_retries: Annotated[int, AtLeast(0)] = 20
    """How often a cell whose worker vanished is taken over."""
    heartbeat: Annotated[float, Above(0)] = 5.0
    """Seconds between a worker's signs of life."""
    grace: Annotated[float, Above(0)] = 30.0
    """Seconds of silence after which another worker takes the cell over."""
    minutes_per_cell: Annotated[float, Above(0)] | None = None
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
        chosen = self.search.fields if self.search else {}
        along = dict.fromkeys([STRENGTH, *chosen])
        label = " ".join([self.arm_name(point), *_assignments(point, along, chosen)])
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


def _assignments(
    point: Mapping[str, Any], names: Iterable[str], chosen: Container[str] = ()
) -> list[str]:
    """``name=value`` of those that are set; numbers with four digits where they have no more, or a
    sampler has chosen them.
    """

    def said(name: str, value: Any) -> str:
        short = f"{value:.4g}" if isinstance(value, float) else str(value)
        exact = not isinstance(value, float) or float(short) == value
        return short if exact or name in chosen else str(value)

    return [f"{name}={said(name, point[name])}" for name in names if name in point]


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
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path} is no mapping; it needs at least recipe, grid and seeds")
    data: dict[str, Any] = {"name": path.stem}
    data |= {k: v for k, v in given.items() if v is not None}
    search = data.pop("search", None)
    check_fields(SweepSpec, data, str(path))
    if "recipe" not in data:
        raise ValueError(f"{path} names no recipe: the path of the script that a cell runs")
    data["recipe"] = str(_beside(path, data["recipe"], "recipe"))
    evaluation = data.pop("evaluation", {})
    if evaluation.get("script"):
        evaluation["script"] = str(_beside(path, evaluation["script"], "evaluation.script"))
    base: dict[str, Any] = {}
    if data.get("config"):
        config = _beside(path, data["config"], "config")
        base, data["config"] = read_yaml(config) or {}, str(config)
        if not isinstance(base, dict):
            raise ValueError(f"config {config} is no mapping of settings")
    base = {k: v for k, v in base.items() if k not in OWN_FIELDS}
    data["settings"] = base | data.get("settings", {})
    spec = SweepSpec(
        **data,
        evaluation=EvaluationSpec(**evaluation),
        search=None if search is None else _search(search),
    )
    _check_shape(spec)
    return _checked_by_recipe(spec)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} stands twice in one mapping; merge them", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        yaml.YAMLError: names the file and the line.
    """
    with path.open("rb") as file:  # bytes: what is not UTF-8 is an error that names the file too
        return yaml.load(file, _Loader)


def _beside(spec: Path, name: str, what: str) -> Path:
    file = (spec.parent / Path(name).expanduser()).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{what}: no such file: {file} (paths start at the spec's folder)")
    return file


def _search(data: Any) -> SearchSpec:
    """``{configurations, sampler, seed, <field>: {low, high, log}}``."""
    if not isinstance(data, dict):
        raise ValueError(f"search is {data!r}; a mapping is needed")
    own = {k: v for k, v in data.items() if k in ("configurations", "sampler", "seed")}
    ranges = {k: v for k, v in data.items() if k not in own}
    if not ranges or "configurations" not in own:
        raise ValueError("search needs configurations: N and a range, such as kl_coef: {low, high}")
    check_fields(SearchSpec, own, "search", "search.")
    if own.get("sampler", "tpe") not in ("tpe", "nsgaii", "random"):
        raise ValueError(f"search.sampler is {own['sampler']!r}; use tpe, nsgaii or random")
    for name, limits in ranges.items():
        if not isinstance(limits, dict) or not {"low", "high"} <= limits.keys():
            raise ValueError(f"search.{name} is {limits!r}; give {{low: , high: , log: true}}")
        refuse_unknown(limits, ["low", "high", "log"], f"search.{name}")
        if not isinstance(limits.get("log", False), bool):
            raise ValueError(f"search.{name}.log is {limits['log']!r}; true or false is needed")
        limits |= {end: _number(limits[end], f"search.{name}.{end}") for end in ("low", "high")}
        if not limits["low"] < limits["high"] or (limits.get("log") and limits["low"] <= 0):
            raise ValueError(f"search.{name} is {limits!r}; low < high, and low > 0 where log")
    return SearchSpec(fields=ranges, **own)


def _number(value: Any, place: str) -> float:
    """A number, also as YAML's text: it reads 1e-3 as such, and 1.0e-3 as a number."""
    try:
        if not isinstance(value, bool):
            return value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{place} is {value!r}; a number is needed")


def _check_shape(spec: SweepSpec) -> None:
    for where in not_finite(asdict(spec), "the spec"):
        raise ValueError(f"{where.removeprefix('the spec.')}; a finite number is needed")
    try:
        spec.to_json()
    except TypeError as error:
        raise ValueError(
            f"{error}: a setting is a number, a text, true or false, a list or a mapping; put a "
            "date in quotes"
        ) from error
    folder = spec.name.strip() not in ("", ".", "..") and Path(spec.name).name == spec.name
    if not folder or not spec.name.isprintable() or len(spec.name.encode()) > 200:
        raise ValueError(
            f"name is {spec.name[:250]!r}; it names a folder: letters, no / and at most 200"
        )
    axes = [
        name
        for axis, values in spec.grid.items()
        for name in dict.fromkeys(
            n for v in values for n in (v if isinstance(v, Mapping) else [axis])
        )
    ]
    for name in axes:
        if axes.count(name) > 1:
            raise ValueError(f"{name} is set by two axes of the grid; leave it to one of them")
    for axis, values in spec.grid.items():
        if not values:
            raise ValueError(f"grid.{axis} is []; give a list of values")
    if not spec.seeds:
        raise ValueError("seeds is []; at least one seed is needed")
    if len(set(spec.seeds)) < len(spec.seeds):
        raise ValueError(f"seeds are {spec.seeds}; a seed stands twice")
    if max(*spec.seeds, spec.evaluation.seed) >= 2**31:
        raise ValueError(f"a seed is {max(*spec.seeds, spec.evaluation.seed)}; use less than 2^31")
    if spec.evaluation.reference_samples == 1:
        raise ValueError("evaluation.reference_samples is 1; use 0 for none, or at least 2")
    if spec.grace <= 2 * spec.heartbeat:
        raise ValueError(
            f"grace is {spec.grace} s and heartbeat {spec.heartbeat} s; a worker must be able to "
            "miss a beat: use a grace of more than two heartbeats"
        )
    for name in spec.search.fields if spec.search else ():
        if any(name in arm for arm in spec.arms):
            raise ValueError(f"{name} stands in grid and in search; choose one of them")
    if spec.search and spec.search.configurations < len(spec.arms):
        raise ValueError(
            f"search.configurations is {spec.search.configurations}, and the grid has "
            f"{len(spec.arms)} points that take turns: give at least as many"
        )


def recipe_settings(recipe: str) -> tuple[type, ...]:
    """The dataclasses of a recipe's settings: what it declares as ``SETTINGS``.

    Raises:
        ValueError: it declares none, or cannot be read.
    """
    try:
        declared = runpy.run_path(recipe, run_name="rlkl.sweep.spec").get("SETTINGS")
    except (Exception, SystemExit) as error:  # anything may stand in a script
        raise ValueError(
            f"{recipe} cannot be read for its SETTINGS: {type(error).__name__}: {error}. Importing "
            "it must do no more than define them: what it does belongs under "
            "if __name__ == '__main__'"
        ) from error
    if (
        not isinstance(declared, tuple | list)
        or not declared
        or not all(map(is_dataclass, declared))
    ):
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
    refuse_unknown(spec.settings, known, f"settings of {where}")
    searched = spec.search.fields if spec.search else {}
    varied = {name for arm in spec.arms for name in arm} | set(searched)
    refuse_unknown(dict.fromkeys(varied), known, f"grid for {where}")
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
    lacking = [n for n in EVALUATED_FIELDS if n not in (*known, "max_prompt_length")]
    if lacking and spec.evaluation.script is None:
        raise ValueError(
            f"the evaluator needs settings that {where} does not declare: {', '.join(lacking)}; "
            "declare them there, or name an evaluator of your own (evaluation.script)"
        )
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    for name, limits in searched.items():
        limits |= _limits_of_field(limits, hints[name], f"search.{name}")
    filled: dict[str, Any] = {}
    points: list[tuple[list[Any], str]] = []
    lows = {name: limits["low"] for name, limits in searched.items()}
    for number, arm in enumerate(spec.arms):
        configuration = spec.configuration(number, lows)
        for name, value in configuration.settings.items():
            if value is None and type(None) not in get_args(hints[name]):
                raise ValueError(f"{configuration.label}: {name} is null; give a value")
            check_number(value, hints[name], f"{configuration.label}: {name}")
        # What a sweep leaves to the recipe, and its records name all the same.
        defaults = [n for n in (*EVALUATED_FIELDS, STRENGTH) if n not in {**arm, **lows}]
        parsed = _parse(classes, configuration)
        whole = {name: getattr(p, name) for p in parsed for name in _names(type(p))}
        filled |= {name: whole[name] for name in defaults if name in whole}
        point = [whole[name] for name in sorted(varied)]
        for other, label in points:
            if other == point:
                raise ValueError(
                    f"two points of the grid are the same: {label}, {configuration.label}"
                )
        points.append((point, configuration.label))
        _check_estimator(configuration)
    values = asdict(spec) | {"settings": {**spec.settings, **filled}}
    return SweepSpec.from_json(json.dumps(values))


def _limits_of_field(limits: dict[str, Any], hint: Any, where: str) -> dict[str, Any]:
    """Both ends as the recipe's field has them: 1 and 10 of a float are 1.0 and 10.0."""
    kinds = {hint, *get_args(hint)}
    ends = {end: limits[end] for end in ("low", "high")}
    if float in kinds:
        return {end: float(value) for end, value in ends.items()}
    if int not in kinds or any(value != int(value) for value in ends.values()):
        raise ValueError(f"{where} is {ends}; a search is over numbers, whole where the field is")
    return {end: int(value) for end, value in ends.items()}


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


def iterate_cells(spec: SweepSpec) -> Iterator[tuple[Configuration, int]]:
    """Configuration and seed of every cell of a grid, in the order in which they are run.

    One seed of every configuration comes before the second of any, so that a sweep that is looked
    at early shows whole curves.
    """
    for seed in spec.seeds:
        for number in range(spec.num_configurations):
            yield spec.configuration(number), seed
