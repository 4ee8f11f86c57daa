"""Review texts from a local jsonl(.xz) file or a hub data set id, cleaned of markup."""

import os
import re
from pathlib import Path
from typing import cast

from datasets import Dataset, load_dataset

from rlkl.data.hub import hub_data_set
from rlkl.data.prompts import check_text

_BREAKS = re.compile(r"\s*(?:<br\s*/?>\s*)+")
_SPACES = re.compile(r"[ \t\r\n\f\v]+")


def clean_text(text: str) -> str:
    """Replaces HTML line breaks and every run of white space by one space.

    >>> clean_text("Dull.<br /><br />Truly  dull.")
    'Dull. Truly dull.'
    """
    return _SPACES.sub(" ", _BREAKS.sub(" ", text)).strip()


def load_reviews(source: str, split: str = "train") -> Dataset:
    """Loads reviews with a ``text`` column (and ``label``, 1 = positive, where the source has one).

    Args:
        source: a local ``.jsonl``, ``.jsonl.xz``, ``.json`` or ``.csv`` file, or a hub data set id
            such as ``stanfordnlp/imdb``; ``id:split`` names a hub split
            (``stanfordnlp/imdb:unsupervised``).
        split: the hub split to take where `source` names none.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the data has no ``text`` column or no rows, or a text that is null, a number or
            a date.
    """
    suffixes = Path(source).suffixes
    if ".jsonl" in suffixes or ".json" in suffixes or ".csv" in suffixes:
        if not os.path.isfile(source):
            raise FileNotFoundError(f"no such file: {source}")
        kind = "csv" if ".csv" in suffixes else "json"
        data = load_dataset(kind, data_files=source, split="train")
    else:
        name, _, named_split = source.partition(":")
        data = hub_data_set(name, named_split or split, ".jsonl, .jsonl.xz, .json or .csv")
    data = cast(Dataset, data)
    if "text" not in data.column_names:
        raise ValueError(f"{source} has the columns {data.column_names}; a 'text' column is needed")
    if len(data) == 0:
        raise ValueError(f"{source} has no rows")
    for number, text in enumerate(data["text"]):
        check_text(text, f"{source}: the text of row {number}")
    return data.map(lambda row: {"text": clean_text(row["text"])})
