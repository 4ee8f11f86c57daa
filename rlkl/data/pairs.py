"""Prompts with completions, or plain texts: the data of distillation, from files or the hub."""

from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from rlkl.data.prompts import check_text

INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task.\n"
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""How an instruction becomes a prompt; ``{input}`` is empty, or a section of its own."""

_ANSWERS = ("completion", "response", "output")


def load_pairs(source: str | Path, references: str | Path | None = None) -> Dataset:
    """A dataset with ``prompt`` and ``completion``, or with ``text``.

    A row may be: ``prompt`` with ``completion``, ``response`` or ``output``; ``instruction`` with
    one of these, and with ``input`` or ``context`` (databricks-dolly-15k); ``instruction`` with
    ``instances`` of ``input`` and ``output`` (Self-Instruct: the first instance counts); ``turns``
    of a question (Vicuna: the first counts); or ``text``. Instructions and questions go through
    `INSTRUCTION_TEMPLATE`. A prompt without an answer has the completion ""; numbers are taken as
    they are written.

    Args:
        source: a ``.jsonl``, ``.jsonl.xz``, ``.json`` or ``.csv`` file, or a hub id (``id:split``).
        references: a file of answers with ``question_id`` and ``choices`` or ``text`` (FastChat's
            two formats), joined to the rows of `source` by ``question_id``. Questions that it does
            not answer have the completion "".

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no rows, a broken file, columns of another kind, a prompt or text that is
            missing, chat messages in place of a text.
    """
    rows = _read(source)
    answers = {} if references is None else {r["question_id"]: r for r in _read(references)}
    pairs = []
    for number, row in enumerate(rows):
        try:
            pairs.append(_pair(row, answers))
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    return Dataset.from_list(pairs)


def _read(source: str | Path) -> list[dict[str, Any]]:
    path = Path(source)
    suffixes = set(path.suffixes)
    if suffixes & {".jsonl", ".json", ".csv"}:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        kind = "csv" if ".csv" in suffixes else "json"
        try:
            data = load_dataset(kind, data_files=str(path), split="train")
        except DatasetGenerationError as error:
            raise ValueError(f"{source} cannot be read as {kind}: {error.__cause__}") from error
        except StopIteration:  # datasets' way to say that a file is empty
            data = []
    else:
        name, _, split = str(source).partition(":")
        data = load_dataset(name, split=split or "train")
    rows = cast(list[dict[str, Any]], list(data))
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _pair(row: dict[str, Any], answers: dict[Any, Any]) -> dict[str, str]:
    answer = next((row[name] for name in _ANSWERS if name in row), None)
    if "prompt" in row:
        return {"prompt": _text(row, "prompt"), "completion": _answer(answer)}
    if "instances" in row:
        first = _first(row, "instances")
        return _instruction(_text(row, "instruction"), first.get("input"), first.get("output"))
    if "instruction" in row:
        given = row.get("input") or row.get("context")
        return _instruction(_text(row, "instruction"), given, answer)
    if "turns" in row:
        reference = answers.get(row.get("question_id"), {})
        choices = reference.get("choices")
        answer = _first(choices[0], "turns") if choices else reference.get("text")
        return _instruction(_first(row, "turns"), None, answer)
    if "text" in row:
        return {"text": _text(row, "text")}
    raise ValueError(
        f"the columns are {sorted(row)}; needed: prompt and completion, instruction and output, or "
        "text"
    )


def _text(row: dict[str, Any], column: str) -> str:
    if row.get(column) is None:
        raise ValueError(f"{column} is missing")
    return _written(row[column], column)


def _answer(value: Any) -> str:
    return "" if value is None else _written(value, "the answer")


def _written(value: Any, name: str) -> str:
    if isinstance(value, list | dict):
        check_text(value, name)
    return str(value)


def _first(row: dict[str, Any], column: str) -> Any:
    if not row[column]:
        raise ValueError(f"{column} is empty")
    return row[column][0]


def _instruction(instruction: str, given: Any, answer: Any) -> dict[str, str]:
    section = f"### Input:\n{given}\n\n" if given else ""
    prompt = INSTRUCTION_TEMPLATE.format(instruction=instruction, input=section)
    return {"prompt": prompt, "completion": _answer(answer)}
