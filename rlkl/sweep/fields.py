"""What a YAML says, and whether it fits the fields of a dataclass: types, bounds, names."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml


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


@dataclass(frozen=True)
class AtLeast:
    """Lower bound of a number: ``Annotated[int, AtLeast(1)]``."""

    least: float

    def holds(self, value: float) -> bool:
        """Whether a value respects it."""
        return value >= self.least

    def __str__(self) -> str:
        return f" >= {self.least}"


@dataclass(frozen=True)
class Above(AtLeast):
    """Lower bound that the number itself may not reach."""

    def holds(self, value: float) -> bool:
        """Whether a value respects it."""
        return value > self.least

    def __str__(self) -> str:
        return f" > {self.least}"


def check_fields(cls: type, given: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Refuses names that a dataclass has not, and values that are not of their field's type.

    Raises:
        ValueError: names the field, its value and what is needed.

    Example:
        >>> @dataclass
        ... class Settings:
        ...     seeds: list[Annotated[int, AtLeast(0)]]
        >>> check_fields(Settings, {"seeds": [0, -1]}, "sweep.yaml")
        Traceback (most recent call last):
        ValueError: seeds[1] is -1; a whole number >= 0 is needed
    """
    hints = get_type_hints(cls, include_extras=True)
    refuse_unknown(given, list(hints), where)
    for name, value in given.items():
        _check(value, hints[name], prefix + name)


_SAID = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_SAID |= {list: "a list", dict: "a mapping"}


def _check(value: Any, hint: Any, place: str, bound: AtLeast | None = None) -> None:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType) and value is None:
        return None
    if kind in (Annotated, Union, UnionType):  # the first says the type; then a bound, or None
        return _check(value, inner[0], place, inner[1] if kind is Annotated else None)
    needed = dict if is_dataclass(kind) else kind
    if needed is Any:
        return None
    fits = isinstance(value, int | float if needed is float else needed)
    if not fits or (isinstance(value, bool) and needed is not bool):
        raise ValueError(f"{place} is {value!r}; {_SAID[needed]}{bound or ''} is needed")
    if bound is not None and not bound.holds(value):
        raise ValueError(f"{place} is {value!r}; {_SAID[needed]}{bound} is needed")
    if is_dataclass(kind):
        check_fields(kind, value, place, f"{place}.")  # pyright: ignore[reportArgumentType]
    if kind is dict:
        for name, item in cast("dict[str, Any]", value).items():
            _check(item, inner[1], f"{place}.{name}")
    if kind is list:
        for number, item in enumerate(cast("list[Any]", value)):
            _check(item, inner[0], f"{place}[{number}]")


def check_number(value: Any, hint: Any, place: str) -> None:
    """Refuses what is no number for a field that is one, or a number or None.

    A text may say a number (YAML reads 1e-3 as a text): it is left to the parser of the field.

    Raises:
        ValueError: names the place, its value and what is needed.

    >>> check_number("1e-3", float, "kl_coef")
    >>> check_number([1, 2], float | None, "kl_coef")
    Traceback (most recent call last):
    ValueError: kl_coef is [1, 2]; a number is needed
    """
    kinds = set(get_args(hint) or [hint]) - {type(None)}
    if kinds and kinds <= {int, float} and not isinstance(value, str | None):
        _check(value, float if float in kinds else int, place)


def check_setting(value: Any, hint: Any, place: str) -> None:
    """Refuses a YAML's value that the type of a setting has no room for.

    A text may say anything that the setting's parser understands (1e-3 is one to YAML); types
    that are not plain ones are left to that parser too.

    Raises:
        ValueError: names the place, its value and what is needed.

    >>> check_setting(None, float | None, "kl_target")
    >>> check_setting(2.5, int, "max_steps")
    Traceback (most recent call last):
    ValueError: max_steps is 2.5; a whole number is needed
    """
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = {get_origin(each) or each: each for each in hints}
    if isinstance(value, str) or not all(map(_is_plain, kinds)):
        return
    if Literal in kinds and value in get_args(kinds[Literal]):
        return
    fitting = next((kinds[kind] for kind in _ROOM.get(type(value), ()) if kind in kinds), None)
    if fitting is None:
        said = [text for kind, text in _SAID.items() if kind in kinds] or [_SAID[str]]
        quotes = "; put it in quotes" if said == [_SAID[str]] and value is not None else ""
        raise ValueError(f"{place} is {_written(value)}; {' or '.join(said)} is needed{quotes}")
    if isinstance(value, list):
        item_hint = (*get_args(fitting), Any)[0]
        for number, item in enumerate(value):
            check_setting(item, item_hint, f"{place}[{number}]")


_ROOM: dict[type, tuple[type, ...]] = {
    NoneType: (NoneType,),
    bool: (bool,),
    int: (int, float),
    float: (float,),
    list: (list, tuple),
    dict: (dict,),
}
"""The types that have room for what a YAML can say, but for texts."""


def _is_plain(kind: Any) -> bool:
    """Whether `check_setting` knows what a type has room for: an enumeration is a text."""
    known = (*_ROOM, str, tuple, Literal)
    return kind in known or (isinstance(kind, type) and issubclass(kind, Enum))


def _written(value: Any) -> str:
    """A value as YAML has it."""
    names: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else repr(value)


def refuse_unknown(given: Mapping[str, Any], known: list[str], where: str) -> None:
    """Refuses names that are not known, with the nearest one that is.

    Raises:
        ValueError: says where the name stands.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}{nearest(name, known)}")


_THE_SAME = (
    ("kl_coef", "beta"),
    ("response_length", "max_completion_length"),
    ("cliprange", "epsilon"),
)
"""What PPO here and TRL's trainers call a setting."""


def nearest(name: Any, known: Iterable[str]) -> str:
    """The question whether a name that is known was meant; nothing where none is near.

    >>> nearest("kl_coeff", ["kl_coef", "seed"]), nearest("kl_coef", ["beta", "seed"])
    ('; did you mean kl_coef?', '; did you mean beta?')
    """
    known = list(known)
    near = [other for pair in _THE_SAME if name in pair for other in pair if other in known]
    near = near or difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def not_finite(value: Any, place: str) -> Iterator[str]:
    """The numbers, at any depth, that are infinite or none at all.

    >>> list(not_finite({"kl_coef": [1.0, math.inf]}, "grid"))
    ['grid.kl_coef[1] is inf']
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from not_finite(item, f"{place}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from not_finite(item, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}"
