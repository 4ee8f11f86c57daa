"""Prompts: from a file, from a data set (hub or folder), or the openings that ship with rlkl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from rlkl.data.hub import hub_data_set
from rlkl.data.rows import read_rows

_ASSETS = Path(__file__).parent / "assets"
EMBEDDED_TRAIN_PROMPTS = _ASSETS / "prompts_train.txt"
EMBEDDED_EVAL_PROMPTS = _ASSETS / "prompts_eval.txt"
"""Openings of reviews, sampled from the embedded review LM (see `recipes/sample_prompts.py`)."""


def load_prompts(source: str | Path, column: str = "prompt") -> Dataset:
    """A dataset with one column, ``prompt``, of non-empty texts.

    Args:
        source: a ``.txt`` file (one prompt a line), a ``.jsonl`` or ``.csv`` file with `column`,
            or a hub data set id or folder (``id:split``, split "train" if none is named).
        column: where the prompts are; renamed to ``prompt``.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no prompts, one that is empty or no text, no such column, a file that is broken
            or of another kind, or a data set that cannot be had.
    """
    path = Path(source)
    if path.suffix in (".txt", ".jsonl", ".csv"):
        if not path.is_file():
            raise FileNotFoundError(f"no such file of prompts: {source}")
        prompts = _read(path, column)
    else:
        data = _data_set(str(source))
        if column not in data.column_names:
            raise ValueError(_no_column(source, data.column_names, column))
        prompts = list(data[column])
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    check_texts(prompts, f"{source}: prompt")
    return Dataset.from_dict({"prompt": prompts})


_TEXTS = ("prompt", "completion", "text")


def collate_prompts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a dataset as columns of texts; tokenising is the sampler's.

    All columns, which rewards may read, are below ``columns``: the Trainer would count the tokens
    of one that is called input_ids.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: columns[name] for name in _TEXTS if name in columns} | {"columns": columns}


def repeated(columns: Mapping[str, Sequence[Any]], times: int) -> dict[str, list[Any]]:
    """Every row `times` times, side by side.

    >>> repeated({"prompt": ["it", "a"]}, 2)
    {'prompt': ['it', 'it', 'a', 'a']}
    """
    return {
        name: [value for value in values for _ in range(times)] for name, values in columns.items()
    }


def check_text(value: Any, name: str) -> None:
    """Refuses a value that is no text: null, a number, chat messages, half of a surrogate pair.

    Raises:
        ValueError: says what it is, by its `name`, and what to do.
    """
    if not isinstance(value, str):
        raise ValueError(
            f"{name} is no text but {value!r:.60}: leave such rows out; chat messages become a "
            "text by tokenizer.apply_chat_template(..., tokenize=False)"
        )
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(
            f"{name} holds half of a surrogate pair, which is no letter: {value!a:.60}; leave "
            "such rows out"
        )


def check_texts(texts: Sequence[Any], name: str, remedy: str = "leave such rows out") -> None:
    """Refuses a column of which a row is no text, or blank.

    Args:
        texts: the column.
        name: what one of them is called; its number, from 0, is put after it.
        remedy: of blank ones.

    Raises:
        ValueError: names the first, and says what to do.
    """
    for i, text in enumerate(texts):
        check_text(text, f"{name} {i}")
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(f"{name} {empty[0]} is empty ({len(empty)} of {len(texts)} are): {remedy}")


def check_prompts(data: Any, which: str, at_least: int) -> None:
    """Refuses a dataset, by its name `which`, that cannot give `at_least` non-empty prompts.

    Raises:
        ValueError: says which column, how many rows, or which row is the trouble.
    """
    if data is None or "prompt" not in data.column_names:
        columns = None if data is None else data.column_names
        raise ValueError(f"a dataset with a 'prompt' column is needed; {which} has {columns}")
    if len(data) == 0:
        raise ValueError(f"{which} has no prompts: give it at least {at_least}")
    check_texts(list(data["prompt"]), f"{which}: prompt")
    if len(data) < at_least:
        raise ValueError(
            f"{len(data)} prompts for per_device_train_batch_size={at_least}; "
            "give more prompts or a smaller batch"
        )


def _data_set(source: str) -> Dataset:
    name, _, split = source.partition(":")
    split = split or "train"
    saved = [Path(name) / file for file in ("state.json", "dataset_dict.json")]
    if not any(file.is_file() for file in saved):
        return hub_data_set(name, split, ".txt, .jsonl or .csv")
    data = load_from_disk(name)
    if isinstance(data, Dataset):
        return data
    if split not in data:
        raise ValueError(f"{name} has the splits {', '.join(map(str, data))}, not {split!r}")
    return data[split]


def _read(path: Path, column: str) -> list[Any]:
    if path.suffix == ".csv":
        rows = [{name: cell or "" for name, cell in row.items()} for row in read_rows(path)]
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                lines = [(i, line.rstrip()) for i, line in enumerate(file, 1) if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8 ({error}): convert it") from error
        if path.suffix == ".txt":
            return [line for _, line in lines]
        rows = [_json_row(path, i, line) for i, line in lines]
    for number, row in enumerate(rows):
        if column not in row:
            raise ValueError(_no_column(f"{path}, row {number},", sorted(row), column))
    return [row[column] for row in rows]


def _no_column(where: str | Path, columns: list[str], column: str) -> str:
    return f"{where} has the columns {columns}, not {column!r}: name the column of the prompts"


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    if not line.lstrip().startswith("{"):
        raise ValueError(f"{path}, line {number} is no JSON object: {line.strip()[:40]!r}")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
