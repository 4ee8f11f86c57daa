"""Data sets by their name: of the hub, or a folder of files."""

from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError


def hub_data_set(name: str, split: str, read_here: str, **options: Any) -> Dataset:
    """One split of a data set; what cannot be had is named, with what to do.

    Args:
        name: hub id or folder.
        split: of it.
        read_here: endings of the files that the caller reads itself, for complaints.
        **options: those of `datasets.load_dataset`.

    Raises:
        ValueError: an empty name, a file of another kind, a split that is not there, or what
            neither the folder nor the hub gives.
    """
    if not name:
        raise ValueError("the name of a data set is empty: name a file, a folder or a hub id")
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file of a kind that is not read here: rename it or convert it to "
            f"{read_here}"
        )
    try:
        return cast(Dataset, load_dataset(name, split=split, **options))
    except (OSError, DatasetsError) as error:
        if Path(name).is_dir():
            raise ValueError(f"the folder {name} cannot be read as a data set: {error}") from error
        raise ValueError(
            f"{name} is no file and no folder here, and the hub does not give it: {error}"
        ) from error
