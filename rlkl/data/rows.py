"""Rows of a JSON or CSV file, with every value as it is written."""

import csv
import json
import lzma
import re
from pathlib import Path
from typing import Any

import fsspec

_SPACE = re.compile(r"\s*")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.csv``, ``.json`` or ``.jsonl`` file, which may be compressed.

    No type is guessed: a number stays the text that stands there (``02139``, ``2.50``), and so do
    ``NA`` and dates. Of JSON, null, true and false are what Python has for them; a row has the
    columns that it names. An empty cell of a CSV file is None.

    Raises:
        ValueError: a broken file; it says what is wrong where.
    """
    kind = "csv" if ".csv" in path.suffixes else "json"
    try:
        opened: Any = fsspec.open(
            str(path), "rt", encoding="utf-8-sig", newline="", compression="infer"
        )
        with opened as file:
            return _csv_rows(file) if kind == "csv" else _json_rows(file.read())
    except (ValueError, csv.Error, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error


def _csv_rows(file: Any) -> list[dict[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(
                f"line {reader.line_num} has more fields than the header: a text with a comma "
                "stands in quotes"
            )
        rows.append({name: cell or None for name, cell in row.items()})
    return rows


def _json_rows(text: str) -> list[dict[str, Any]]:
    """One object after another, or a list of them."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    values: list[Any] = []
    end = _after_space(text, 0)
    while end < len(text):
        value, end = decoder.raw_decode(text, end)
        values += value if isinstance(value, list) else [value]
        end = _after_space(text, end)
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"row {number} is no object but {value!r:.60}")
    return values


def _after_space(text: str, begin: int) -> int:
    space = _SPACE.match(text, begin)
    return begin if space is None else space.end()
