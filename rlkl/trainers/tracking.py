"""Weights & Biases as a mirror of the files: runs that never prompt, and completions tables."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb

from rlkl.kl import sequence_kl
from rlkl.rollout import Rollout
from rlkl.rollout.summary import REPORTED_ESTIMATORS, token_kl
from rlkl.trainers.config import PPOConfig


def wandb_mode() -> str:
    """"online" where a key is at hand, else "offline"; the environment's WANDB_MODE goes first."""
    chosen = os.environ.get("WANDB_MODE")
    if chosen:
        return chosen
    return "online" if wandb.Api().api_key else "offline"


@contextmanager
def wandb_run(args: PPOConfig, config: dict[str, Any], group: str, tags: list[str]) -> Iterator[None]:
    """Opens a W&B run for the block if `args.report_to` names wandb and none is open.

    Without a key the run is written to ``<output_dir>/wandb`` and can be sent later by ``wandb sync``.
    The run's id is kept in the output folder, so that a resumed training goes on in the same run.
    """
    if "wandb" not in args.report_to or wandb.run is not None:
        yield
        return
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "wandb_run_id.txt"
    if not id_file.is_file():
        id_file.write_text(wandb.util.generate_id())
    run = wandb.init(
        project=args.wandb_project,
        name=args.run_name,
        group=args.wandb_group or group,
        tags=[*tags, *args.wandb_tags],
        config=config,
        dir=str(folder),
        id=id_file.read_text(),
        resume="allow",
        mode=wandb_mode(),  # pyright: ignore[reportArgumentType]
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        yield
    finally:
        run.finish()


def log_completions(rollout: Rollout, step: int, count: int, folder: Path) -> None:
    """The first `count` responses with their scores and KL: to ``completions.jsonl`` and to W&B."""
    mask = rollout.responses.mask
    kl = {
        name: sequence_kl(token_kl(name, rollout), mask).tolist() for name in REPORTED_ESTIMATORS
    }
    rows = [
        {
            "step": step,
            "prompt": rollout.responses.prompts[i],
            "response": rollout.responses.texts[i],
            "score": float(rollout.scores[i]),
            **{f"judge/{name}": float(s[i]) for name, s in rollout.other_scores.items()},
            **{f"kl/{name}": values[i] for name, values in kl.items()},
        }
        for i in range(min(count, len(rollout)))
    ]
    with (folder / "completions.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if wandb.run is not None:
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        wandb.run.log({"completions": table}, commit=False)
