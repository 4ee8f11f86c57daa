"""Prompts with completions, or plain texts: the data of distillation, from files or the hub."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from rlkl.data.hub import hub_data_set
from rlkl.data.prompts import check_text
from rlkl.data.rows import read_rows

INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task.\n"
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""How an instruction becomes a prompt; ``{input}`` is empty, or a section of its own."""

_KINDS = ("prompt", "instances", "instruction", "turns", "text")
_ANSWERS = ("completion", "response", "output")
_TEXTS = ("prompt", "instruction", "text", "input", "context", *_ANSWERS)


def load_pairs(source: str | Path, references: str | Path | None = None) -> Dataset:
    """A dataset with ``prompt`` and ``completion``, or with ``text``.

    A row may be: ``prompt`` with ``completion``, ``response`` or ``output``; ``instruction`` with
    one of these, and with ``input`` or ``context`` (databricks-dolly-15k); ``instruction`` with
    ``instances`` of ``input`` and ``output`` (Self-Instruct: the first instance counts); ``turns``
    of a question (Vicuna: the first counts); or ``text``. Rows of prompts, instructions and
    questions may stand in one source. Columns that are empty or null are not there.

    Instructions and questions go through `INSTRUCTION_TEMPLATE`. A prompt without an answer has the
    completion "". A file's numbers, dates and words like ``NA`` are taken as they are written,
    those of a hub data set's CSV files too; Parquet has the types that it was given.

    Args:
        source: a ``.jsonl``, ``.jsonl.xz``, ``.json`` or ``.csv`` file, or a hub id (``id:split``).
        references: a file of answers with ``question_id`` and ``choices`` or ``text`` (FastChat's
            two formats), each question once, joined by ``question_id`` to the rows of `source`
            that have no answer of their own. Rows that it does not answer have the completion "".

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no rows, a broken file, columns of another kind, a prompt or text that is
            missing, plain texts beside prompts, chat messages in place of a text; with
            `references`, ``turns`` or an answer without ``question_id``, or two answers with one;
            a data set that cannot be had, or of JSON files whose texts are numbers or dates.
    """
    rows = _read(source)
    answers = None if references is None else _references(references)
    pairs: list[dict[str, str]] = []
    for number, row in enumerate(rows):
        try:
            pairs.append(_pair(row, answers))
            if pairs[-1].keys() != pairs[0].keys():
                raise ValueError("plain text and prompts are mixed: put them into two files")
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    return Dataset.from_list(pairs)


def _read(source: str | Path) -> list[dict[str, Any]]:
    path = Path(source)
    if {".jsonl", ".json", ".csv"} & set(path.suffixes):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        rows = read_rows(path)
    else:
        rows = _hub_rows(str(source))
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _hub_rows(source: str) -> list[dict[str, Any]]:
    """Rows of a data set of the hub, without what `datasets` guesses of CSV and JSON files."""
    name, _, named = source.partition(":")
    split = named or "train"
    read_here = ".jsonl, .json or .csv"
    data = hub_data_set(name, split, read_here)
    if data.info.builder_name == "csv":  # 02139 is read as 2139, NA as null
        text = Features(dict.fromkeys(data.column_names, Value("string")))
        data = hub_data_set(name, split, read_here, features=text, keep_default_na=False)
    if data.info.builder_name == "json":  # 2.50 is read as 2.5, a date with a time of day
        for column, feature in data.features.items():
            kind = feature.dtype if isinstance(feature, Value) else ""
            if column in _TEXTS and kind.startswith(("float", "timestamp")):
                raise ValueError(
                    f"{source} has JSON files, of whose column {column} datasets makes {kind}: "
                    "download them and give a file by its path, which is taken as it is written"
                )
    return [dict(row) for row in data]


def _references(source: str | Path) -> dict[str, Any]:
    """Answers, by the id of their question."""
    answers: dict[str, Any] = {}
    for number, row in enumerate(_read(source)):
        try:
            if "choices" not in row and "text" not in row:
                raise ValueError(
                    f"the columns are {sorted(row)}; a reference needs question_id, and choices "
                    "or text: rename a column"
                )
            choices = row.get("choices")
            answer = _first(_first_object(row, "choices"), "turns") if choices else row.get("text")
            question = _question(row)
            if question in answers:
                raise ValueError(
                    f"question_id {question} is answered for the second time, and one answer "
                    "counts: leave the others out"
                )
            answers[question] = answer
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    return answers


def _identified(row: dict[str, Any]) -> bool:
    return row.get("question_id") not in (None, "")


def _question(row: dict[str, Any]) -> str:
    if not _identified(row):
        raise ValueError(
            f"question_id is missing, by which questions find their references; the columns are "
            f"{sorted(row)}"
        )
    return str(row["question_id"])


def _pair(row: dict[str, Any], answers: dict[str, Any] | None) -> dict[str, str]:
    answer = _value(row, *_ANSWERS)
    named = [kind for kind in _KINDS if kind in row]
    filled = [kind for kind in named if row[kind] not in (None, "")]
    kind = next(iter([*filled, *named]), None)
    if answer is None and answers is not None and (kind == "turns" or _identified(row)):
        answer = answers.get(_question(row))
    if kind == "prompt":
        return {"prompt": _text(row, "prompt"), "completion": _answer(answer)}
    if kind == "instances":
        first = _first_object(row, "instances")
        given, own = _value(first, "input"), _value(first, "output")
        return _instruction(_text(row, "instruction"), given, answer if own is None else own)
    if kind == "instruction":
        return _instruction(_text(row, "instruction"), _value(row, "input", "context"), answer)
    if kind == "turns":
        return _instruction(_first(row, "turns"), None, answer)
    if kind == "text":
        return {"text": _text(row, "text")}
    raise ValueError(
        f"the columns are {sorted(row)}; needed: prompt and completion, instruction and output, or "
        "text"
    )


def _value(row: dict[str, Any], *columns: str) -> Any:
    """The first of these columns that is neither empty nor null."""
    return next((row[name] for name in columns if row.get(name) not in (None, "")), None)


def _text(row: dict[str, Any], column: str) -> str:
    if row.get(column) is None:
        raise ValueError(f"{column} is missing")
    return _written(row[column], column)


def _answer(value: Any) -> str:
    return "" if value is None else _written(value, "the answer")


def _written(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return json.dumps(value)  # as in the file
    if isinstance(value, str | list | dict):
        check_text(value, name)
    return str(value)


def _first(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise ValueError(f"{column} is missing; the columns are {sorted(row)}")
    if not row[column]:
        raise ValueError(f"{column} is empty")
    if not isinstance(row[column], list):
        raise ValueError(
            f"{column} is no list but {row[column]!r:.60}: a JSON file can hold one, a CSV file not"
        )
    return row[column][0]


def _first_object(row: dict[str, Any], column: str) -> dict[str, Any]:
    first = _first(row, column)
    if not isinstance(first, dict):
        raise ValueError(f"{column} holds no objects but {first!r:.60}")
    return first


def _instruction(instruction: str, given: Any, answer: Any) -> dict[str, str]:
    section = "" if given is None else f"### Input:\n{_written(given, 'the input')}\n\n"
    prompt = INSTRUCTION_TEMPLATE.format(instruction=instruction, input=section)
    return {"prompt": prompt, "completion": _answer(answer)}
