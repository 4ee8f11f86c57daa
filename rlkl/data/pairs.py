"""Prompts with completions, or plain texts: the data of distillation, from files or the hub."""

from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset

INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task.\n"
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""How an instruction becomes a prompt; ``{input}`` is empty, or a section of its own."""

_ANSWERS = ("completion", "response", "output")


def load_pairs(source: str | Path, references: str | Path | None = None) -> Dataset:
    """A dataset with ``prompt`` and ``completion``, or with ``text``.

    A row may be: ``prompt`` with ``completion``, ``response`` or ``output``; ``instruction`` (and
    ``input``) with one of these; ``instruction`` with ``instances`` of ``input`` and ``output``
    (Self-Instruct: the first instance counts); ``turns`` of a question (Vicuna: the first counts);
    or ``text``. Instructions and questions go through `INSTRUCTION_TEMPLATE`. A prompt without an
    answer has the completion "".

    Args:
        source: a ``.jsonl``, ``.jsonl.xz``, ``.json`` or ``.csv`` file, or a hub id (``id:split``).
        references: a file of answers with ``question_id`` and ``choices`` or ``text`` (FastChat's
            two formats), joined to the rows of `source` by ``question_id``. Questions that it does
            not answer have the completion "".

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no rows, or columns of another kind.
    """
    rows = _read(source)
    answers = {} if references is None else {r["question_id"]: r for r in _read(references)}
    pairs = [_pair(row, answers, source) for row in rows]
    if not pairs:
        raise ValueError(f"{source} has no rows")
    return Dataset.from_list(pairs)


def _read(source: str | Path) -> list[dict[str, Any]]:
    path = Path(source)
    suffixes = set(path.suffixes)
    if suffixes & {".jsonl", ".json", ".csv"}:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        kind = "csv" if ".csv" in suffixes else "json"
        data = load_dataset(kind, data_files=str(path), split="train")
    else:
        name, _, split = str(source).partition(":")
        data = load_dataset(name, split=split or "train")
    return cast(Dataset, data).to_list()


def _pair(row: dict[str, Any], answers: dict[Any, Any], source: str | Path) -> dict[str, str]:
    answer = next((str(row[name] or "") for name in _ANSWERS if name in row), "")
    if "prompt" in row:
        return {"prompt": row["prompt"], "completion": answer}
    if "instances" in row:
        first = row["instances"][0]
        return _instruction(row["instruction"], first["input"], first["output"])
    if "instruction" in row:
        return _instruction(row["instruction"], row.get("input"), answer)
    if "turns" in row:
        reference = answers.get(row.get("question_id"), {})
        choices = reference.get("choices")
        answer = choices[0]["turns"][0] if choices else reference.get("text", "")
        return _instruction(row["turns"][0], None, answer)
    if "text" in row:
        return {"text": row["text"]}
    raise ValueError(
        f"{source} has the columns {sorted(row)}; needed: prompt and completion, instruction and "
        "output, or text"
    )


def _instruction(instruction: str, given: str | None, answer: str) -> dict[str, str]:
    section = f"### Input:\n{given}\n\n" if given else ""
    prompt = INSTRUCTION_TEMPLATE.format(instruction=instruction, input=section)
    return {"prompt": prompt, "completion": answer}
