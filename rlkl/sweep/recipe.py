"""Whether the cells of a sweep fit their recipe: its own parser takes the settings of each."""

import json
import runpy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, get_args, get_type_hints

from rlkl.sweep.algorithms import in_own_names, in_sweep_names
from rlkl.sweep.fields import check_number, not_finite, refuse_unknown
from rlkl.sweep.spec import (
    ALGORITHM,
    EVALUATED_FIELDS,
    OWN_FIELDS,
    STRENGTH,
    Configuration,
    SweepSpec,
)


class Command(Protocol):
    """A command of rlkl's that trains, as the command line knows it."""

    @property
    def settings(self) -> tuple[type, ...]:
        """The dataclasses of its settings."""
        ...

    @property
    def defaults(self) -> str:
        """The YAML that holds where no other is given."""
        ...


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


@dataclass(frozen=True)
class _Recipe:
    """What a cell runs: a script, or the command of an algorithm."""

    name: str
    algorithm: str | None
    classes: tuple[type, ...]

    @property
    def hints(self) -> dict[str, Any]:
        """The types of its settings, by the sweep's names."""
        hints = {name: hint for c in self.classes for name, hint in get_type_hints(c).items()}
        return self._named({name: hints[name] for c in self.classes for name in _names(c)})

    def parse(self, configuration: Configuration) -> dict[str, Any]:
        """What its own parser makes of a cell's settings, by the sweep's names."""
        from trl import TrlParser  # slow to import, and not needed by workers

        class Parser(TrlParser):
            def error(self, message: str) -> NoReturn:
                raise ValueError(f"{configuration.label}: {message}")

        settings = configuration.settings
        if self.algorithm is not None:
            settings = in_own_names(self.algorithm, settings)
        parser = Parser(self.classes)  # pyright: ignore[reportArgumentType]
        own = {"output_dir": "runs"} if any("output_dir" in _names(c) for c in self.classes) else {}
        unknown = parser.set_defaults_with_config(**settings, **own)
        if unknown:
            raise ValueError(f"{configuration.label}: unknown {unknown[0]}")
        parsed = parser.parse_args_into_dataclasses(args=[])
        return self._named({n: getattr(p, n) for p in parsed for n in _names(type(p))})

    def _named(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings if self.algorithm is None else in_sweep_names(settings, self.name)


def checked_by_recipe(spec: SweepSpec, commands: Mapping[str, Command]) -> SweepSpec:
    """The spec, once the parser of each cell's recipe has taken the settings of its configuration.

    The measurement's settings come back with the recipe's defaults filled in.
    """
    recipes = _recipes(spec, commands)
    known = {algorithm: recipe.hints for algorithm, recipe in recipes.items()}
    searched = spec.search.fields if spec.search else {}
    varied = {name for arm in spec.arms for name in arm} | set(searched)
    if spec.recipe is None:
        varied.discard(ALGORITHM)
    for algorithm, recipe in recipes.items():
        _check_names(spec, algorithm, recipe.name, known)
    for name in sorted(varied | set(spec.settings)):
        if name in OWN_FIELDS:
            raise ValueError(f"{name} is given to each cell by the sweep (seeds: for seeds)")
    for name in sorted(varied):
        if name in EVALUATED_FIELDS:
            raise ValueError(
                f"{name} cannot be varied: it defines what is measured, which must be the same "
                "for all cells; put it under settings"
            )
    for algorithm, recipe in recipes.items():
        _check_measurable(spec, recipe.name, known[algorithm])
    for name, limits in searched.items():
        for hints in known.values():
            limits |= _limits_of_field(limits, hints[name], f"search.{name}")
    lows = {name: limits["low"] for name, limits in searched.items()}
    cells: list[tuple[Configuration, dict[str, Any]]] = []
    for number, arm in enumerate(spec.arms):
        configuration = spec.configuration(number, lows)
        algorithm = spec.algorithm_of(arm)
        _check_values(configuration, known[algorithm])
        whole = recipes[algorithm].parse(configuration)
        for place in not_finite({n: whole[n] for n in whole if n in configuration.settings}, ""):
            raise ValueError(f"{configuration.label}: {place[1:]}; a finite number is needed")
        for other, there in cells:
            if (spec.algorithm_of(other.settings), *(there.get(n) for n in varied)) == (
                algorithm,
                *(whole.get(n) for n in varied),
            ):
                raise ValueError(
                    f"two points of the grid are the same: {other.label}, {configuration.label}"
                )
        _check_estimator(configuration)
        cells.append((configuration, whole))
    return _filled(spec, cells, set(lows))


def _recipes(spec: SweepSpec, commands: Mapping[str, Command]) -> dict[str | None, _Recipe]:
    """What the cells run, by the algorithms of the grid; by None where it is a script."""
    if spec.recipe is not None:
        name, classes = Path(spec.recipe).name, recipe_settings(spec.recipe)
        return {None: _Recipe(name, None, classes)}
    found = dict.fromkeys(str(spec.algorithm_of(arm)) for arm in spec.arms)
    return {name: _Recipe(name, name, commands[name].settings) for name in found}


def _check_names(
    spec: SweepSpec, algorithm: str | None, recipe: str, known: Mapping[str | None, Mapping]
) -> None:
    """Refuses settings that a recipe has not, of the sweep and of its own arms."""
    own = {n for arm in spec.arms if spec.algorithm_of(arm) == algorithm for n in arm}
    if algorithm is not None:
        own.discard(ALGORITHM)
    searched = spec.search.fields if spec.search else {}
    places = {
        f"base settings of {recipe}": spec.defaults.get(str(algorithm), {}),
        f"settings of {recipe}": spec.settings,
        f"grid for {recipe}": dict.fromkeys(sorted(own | set(searched))),
    }
    for where, given in places.items():
        for name in given:
            if name == ALGORITHM and algorithm is None and name not in known[None]:
                raise ValueError(f"{where}: {ALGORITHM} takes a recipe's place; leave recipe out")
            others = [other for other, hints in known.items() if name in hints]
            if name not in known[algorithm] and others:
                raise ValueError(
                    f"{where}: {name} is a setting of {others[0]} and none of {recipe}; give it to "
                    f"the arms that have it: {{{ALGORITHM}: {others[0]}, {name}: ...}}"
                )
        refuse_unknown(given, list(known[algorithm]), where)


def _check_measurable(spec: SweepSpec, recipe: str, known: Mapping[str, Any]) -> None:
    """Refuses a recipe whose runs the evaluator could not measure."""
    if spec.evaluation.checkpoints and "keep_checkpoints" not in known:
        raise ValueError(
            f"evaluation.checkpoints needs a recipe that can keep them; {recipe} can't"
        )
    lacking = [n for n in EVALUATED_FIELDS if n not in (*known, "max_prompt_length")]
    if lacking and spec.evaluation.script is None:
        raise ValueError(
            f"the evaluator needs settings that {recipe} does not declare: {', '.join(lacking)}; "
            "declare them there, or name an evaluator of your own (evaluation.script)"
        )


def _check_values(configuration: Configuration, hints: Mapping[str, Any]) -> None:
    """Refuses values that are none, or no numbers, for fields that need them."""
    for name, value in configuration.settings.items():
        if name not in hints:  # which algorithm it is
            continue
        if value is None and type(None) not in get_args(hints[name]):
            raise ValueError(f"{configuration.label}: {name} is null; give a value")
        check_number(value, hints[name], f"{configuration.label}: {name}")


def _filled(
    spec: SweepSpec, cells: list[tuple[Configuration, dict[str, Any]]], searched: set[str]
) -> SweepSpec:
    """The spec with what it leaves to the recipes, and its records name all the same.

    Raises:
        ValueError: cells would be measured in different ways.
    """
    values = asdict(spec)
    first, whole = cells[0]
    for name in EVALUATED_FIELDS:
        for other, there in cells:
            if there.get(name) != whole.get(name):
                raise ValueError(
                    f"{name} is {whole.get(name)!r} in {first.label} and {there.get(name)!r} in "
                    f"{other.label}: it defines what is measured, which must be the same for all "
                    "cells; put it under settings"
                )
        if all(name in there for _, there in cells):
            values["settings"][name] = whole[name]
    for (configuration, there), arm in zip(cells, spec.arms, strict=True):
        if STRENGTH in there and STRENGTH not in {*arm, *searched}:
            algorithm = spec.algorithm_of(configuration.settings)
            base = values["settings"] if algorithm is None else values["defaults"][algorithm]
            base[STRENGTH] = there[STRENGTH]
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
