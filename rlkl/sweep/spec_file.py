"""The YAML of a sweep, read and checked."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from rlkl.sweep.algorithms import ALGORITHMS, CHOICES, in_sweep_names
from rlkl.sweep.fields import check_fields, not_finite, read_yaml, refuse_unknown
from rlkl.sweep.recipe import Command, checked_by_recipe
from rlkl.sweep.spec import ALGORITHM, OWN_FIELDS, EvaluationSpec, SearchSpec, SweepSpec


def load_spec(path: str | Path, command: Callable[[str], Command] | None = None) -> SweepSpec:
    """Reads and checks a sweep's YAML, every cell's settings by the recipe's own parser.

    Args:
        path: of the YAML.
        command: gives rlkl's own command of an `algorithm`. They are the command line's, which is
            above sweeps: `rlkl.cli.sweep.command_named`. A spec with a recipe needs none.

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
        raise ValueError(f"{path} is no mapping; it needs at least a recipe or algorithm, and grid")
    data: dict[str, Any] = {"name": path.stem}
    data |= {k: v for k, v in given.items() if v is not None}
    search = data.pop("search", None)
    if isinstance(data.get(ALGORITHM), list):
        raise ValueError(f"{path}: several algorithms are an axis; put the list into the grid")
    check_fields(SweepSpec, data, str(path))
    if "recipe" in data and ALGORITHM in data:
        raise ValueError(f"{path} names a recipe and an algorithm: leave one out")
    evaluation = data.pop("evaluation", {})
    if evaluation.get("script"):
        evaluation["script"] = str(_beside(path, evaluation["script"], "evaluation.script"))
    base = None
    if data.get("config"):
        config = _beside(path, data["config"], "config")
        base, data["config"] = _settings_in(config), str(config)
    if "recipe" in data:
        data["recipe"] = str(_beside(path, data["recipe"], "recipe"))
        data["settings"] = (base or {}) | data.get("settings", {})
    else:
        data["settings"] = in_sweep_names(data.get("settings", {}), "settings")
        data["grid"] = {
            axis: [in_sweep_names(v, f"grid.{axis}") if isinstance(v, dict) else v for v in values]
            for axis, values in in_sweep_names(data.get("grid", {}), "grid").items()
        }
        bases = data.get("defaults", {}).items()
        data["defaults"] = {name: in_sweep_names(own, "defaults") for name, own in bases}
        search = in_sweep_names(search, "search") if isinstance(search, dict) else search
    spec = SweepSpec(
        **data,
        evaluation=EvaluationSpec(**evaluation),
        search=None if search is None else _search(search),
    )
    commands = _commands(spec, command, path)
    for algorithm in commands:
        own = _settings_in(Path(commands[algorithm].defaults)) if base is None else base
        spec.defaults.setdefault(algorithm, in_sweep_names(own, "config"))
    refuse_unknown(spec.defaults, list(commands), f"{path}: defaults")
    _check_shape(spec)
    return checked_by_recipe(spec, commands)


def _settings_in(config: Path) -> dict[str, Any]:
    """The settings of a YAML that a sweep does not give to its cells itself."""
    base = read_yaml(config) or {}
    if not isinstance(base, dict):
        raise ValueError(f"config {config} is no mapping of settings")
    return {k: v for k, v in base.items() if k not in OWN_FIELDS}


def _commands(
    spec: SweepSpec, command: Callable[[str], Command] | None, path: Path
) -> dict[str, Command]:
    """The commands of the algorithms of a sweep; none where a recipe is run."""
    found: dict[str, Command] = {}
    for arm in spec.arms if spec.recipe is None else []:
        algorithm = spec.algorithm_of(arm)
        if algorithm is None:
            raise ValueError(
                f"{path} names no recipe: the path of a script that a cell runs, or in its place "
                f"as algorithm: {CHOICES} (for all cells, or in the grid)"
            )
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise ValueError(f"{ALGORITHM} is {algorithm!r}; use {CHOICES}")
        if command is None:
            raise ValueError("load_spec needs the commands: give it rlkl.cli.sweep.command_named")
        found[algorithm] = command(algorithm)
    return found


def spec_yaml(spec: Mapping[str, Any]) -> str:
    """The YAML of a spec, given as `dataclasses.asdict` has it: `load_spec` reads it again.

    It is whole: what the base config says stands in its settings.
    """
    given = {f.name: spec.get(f.name) for f in fields(SweepSpec) if f.name != "config"}
    given = {name: value for name, value in given.items() if value not in (None, {})}
    if "search" in given:
        own = {name: value for name, value in given["search"].items() if name != "fields"}
        given["search"] = own | given["search"]["fields"]
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


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
