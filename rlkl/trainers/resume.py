"""Going on where a run was stopped: its last whole checkpoint, and the settings it must share."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

FREE = ("output_dir", "logging_dir", "report_to", "run_name", "wandb_arm", "wandb_tags")
FREE += ("threads", "save_steps")
"""Settings of a run that another command may change when it goes on."""


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a run's folder, None where there is none.

    A kill can cut a checkpoint short. transformers writes ``trainer_state.json`` last: a checkpoint
    without it, or with half of it, is passed over for the one before.
    """
    whole = [
        state.parent
        for state in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")
        if state.read_text().endswith("}\n")
    ]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    return None if newest is None else str(newest)


def saved_state(checkpoint: str) -> TrainerState:
    """How far a checkpoint is."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def check_settings(file: Path, settings: dict[str, Any], what: str) -> None:
    """Refuses to go on with settings that differ from those kept in a JSON file.

    Args:
        file: in the folder of the run.
        settings: now; what JSON does not know counts by its text.
        what: the folder holds, as the complaint calls it.

    Raises:
        ValueError: names the first that differs, before and now.
    """
    earlier = json.loads(file.read_text())
    for key, now in json.loads(json.dumps(settings, default=str)).items():
        if earlier.get(key) != now:
            raise ValueError(
                f"{file.parent} holds {what} with {key}={earlier.get(key)}, not {now}: choose "
                "another --output_dir, or delete that folder"
            )
