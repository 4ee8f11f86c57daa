"""Whether what a YAML says fits the fields of a dataclass: types, bounds, names."""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints


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


def refuse_unknown(given: Mapping[str, Any], known: list[str], where: str) -> None:
    """Refuses names that are not known, with the nearest one that is.

    Raises:
        ValueError: says where the name stands.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: unknown field {name!r}{hint}")


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
