"""Prompts: from a file, from a hub data set, or the review openings that ship with rlkl."""

import csv
import json
from pathlib import Path
from typing import cast

from datasets import Dataset, load_dataset

_ASSETS = Path(__file__).parent / "assets"
EMBEDDED_TRAIN_PROMPTS = _ASSETS / "prompts_train.txt"
EMBEDDED_EVAL_PROMPTS = _ASSETS / "prompts_eval.txt"
"""Openings of reviews, sampled from the embedded review LM (see `recipes/sample_prompts.py`)."""


def load_prompts(source: str | Path, column: str = "prompt") -> Dataset:
    """A dataset with one column, ``prompt``, of non-empty texts.

    Args:
        source: a ``.txt`` file (one prompt a line), a ``.jsonl`` or ``.csv`` file with `column`,
        or a
            hub data set id (``id:split``, split "train" if none is named).
        column: where the prompts are; renamed to ``prompt``.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no prompts, an empty prompt, or no such column.
    """
    path = Path(source)
    if path.suffix in (".txt", ".jsonl", ".csv"):
        if not path.is_file():
            raise FileNotFoundError(f"no such file of prompts: {source}")
        prompts = _read(path, column)
    else:
        name, _, split = str(source).partition(":")
        data = cast(Dataset, load_dataset(name, split=split or "train"))
        if column not in data.column_names:
            raise ValueError(f"{source} has the columns {data.column_names}, not {column!r}")
        prompts = list(data[column])
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    empty = [i for i, prompt in enumerate(prompts) if not str(prompt).strip()]
    if empty:
        raise ValueError(f"{source}: prompt {empty[0] + 1} of {len(prompts)} is empty")
    return Dataset.from_dict({"prompt": prompts})


def _read(path: Path, column: str) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".txt":
            return [line.rstrip() for line in file if line.strip()]
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            rows = [_json_row(path, i, line) for i, line in enumerate(file, 1) if line.strip()]
    without = [row for row in rows if column not in row]
    if without:
        raise ValueError(f"{path} has the columns {sorted(without[0])}, not {column!r}")
    return [row[column] or "" for row in rows]


def _json_row(path: Path, number: int, line: str) -> dict[str, str]:
    if not line.lstrip().startswith("{"):
        raise ValueError(f"{path}, line {number} is no JSON object: {line.strip()[:40]!r}")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
