"""Weights & Biases as a mirror of the files: runs that never prompt, and completions tables."""

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback

from rlkl.kl import sequence_kl
from rlkl.rollout import Rollout
from rlkl.rollout.summary import REPORTED_ESTIMATORS, token_kl
from rlkl.trainers.config import PPOConfig
from rlkl.trainers.run_config import WandbArguments


def wandb_mode() -> str:
    """The environment's WANDB_MODE, else "online" where a key is at hand, else "offline".

    "online" without a key goes on offline, and says on standard error what to do.
    """
    chosen = os.environ.get("WANDB_MODE")
    if chosen and chosen != "online":
        return chosen
    if wandb.login(prompt=False, verify=False):
        return "online"
    if chosen:
        print(
            "WANDB_MODE is online, but there is no key: run `wandb login` or set WANDB_API_KEY. "
            "Going on offline; `wandb sync` sends the run later.",
            file=sys.stderr,
        )
    return "offline"


@contextmanager
def wandb_run(
    args: TrainingArguments,
    config: dict[str, Any],
    group: str,
    tags: list[str],
    resume: bool = False,
) -> Iterator[None]:
    """Opens a W&B run for the block if `args.report_to` names wandb and none is open.

    Of several processes the first one does.

    Without a key the run is written to ``<output_dir>/wandb`` and can be sent later by ``wandb
    sync``. The run's id is kept in the output folder, so that a training that is resumed (`resume`,
    or ``args.resume_from_checkpoint``) goes on in the same run; any other training is a run of its
    own.
    """
    mirrored = "wandb" in (args.report_to or ()) and args.process_index == 0
    if not mirrored or wandb.run is not None:
        yield
        return
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "wandb_run_id.txt"
    if not (id_file.is_file() and (resume or args.resume_from_checkpoint)):
        id_file.write_text(secrets.token_hex(4))
    names = args if isinstance(args, WandbArguments) else WandbArguments()
    run = wandb.init(
        project=names.wandb_project,
        name=args.run_name,
        group=names.wandb_group or group,
        tags=[*tags, *([own] if isinstance(own := names.wandb_tags, str) else own)],
        config=config,
        dir=str(folder),
        id=names.wandb_run_id or id_file.read_text(),
        resume="allow",
        mode=wandb_mode(),  # pyright: ignore[reportArgumentType]
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        yield
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


class WandbMirror(WandbCallback):
    """The Trainer's callback, which opens no run of its own and so never asks for a key.

    What is logged while no `wandb_run` is open, such as an evaluation before training, is in the
    files alone.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Takes note of the settings, in every run anew."""
        self._initialized = False
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Logs to the open run, if there is one."""
        if wandb.run is not None:
            super().on_log(args, state, control, **kwargs)


def log_final(metrics: dict[str, dict[str, float]]) -> None:
    """Final metrics of each held-out set to the open W&B run, as ``final/<set>/<metric>``."""
    if wandb.run is not None:
        wandb.run.log(
            {f"final/{name}/{k}": v for name, values in metrics.items() for k, v in values.items()}
        )


def log_completions(rollout: Rollout, step: int, args: PPOConfig) -> None:
    """The first responses with their scores and KL, in the steps of which the settings want it: to
    ``completions.jsonl`` and to W&B.
    """
    every = args.log_completions_steps
    if every <= 0 or (step - 1) % every or args.process_index:
        return
    mask = rollout.responses.mask
    kl = {name: sequence_kl(token_kl(name, rollout), mask).tolist() for name in REPORTED_ESTIMATORS}
    rows = [
        {
            "step": step,
            "prompt": rollout.responses.prompts[i],
            "response": rollout.responses.texts[i],
            "score": float(rollout.scores[i]),
            **{f"judge/{name}": float(s[i]) for name, s in rollout.other_scores.items()},
            **{f"kl/{name}": values[i] for name, values in kl.items()},
        }
        for i in range(min(args.num_completions, len(rollout)))
    ]
    with (Path(str(args.output_dir)) / "completions.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if wandb.run is not None:
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        wandb.run.log({"completions": table}, commit=False)
