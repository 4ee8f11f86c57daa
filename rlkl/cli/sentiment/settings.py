"""What the YAML and the command line of a sentiment run may set."""

import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig, RLOOConfig

from rlkl.trainers.run_config import WandbArguments, check_intervals, choose_precision


@dataclass
class SentimentArguments:
    """What is trained towards and measured, beside the trainer's settings (how) and TRL's
    ModelConfig (what model).
    """

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model; None: the policy as it starts."}
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "Sequence classifier (hub id or folder); None: the embedded."},
    )
    positive_label: str | None = field(
        default=None, metadata={"help": "Name of its positive label; None: found by its name."}
    )
    reward_score: str = field(
        default="log_odds", metadata={"help": "log_odds, or logit: the raw positive logit."}
    )
    reward_clamp: float | None = field(
        default=None,
        metadata={"help": "Scores are limited to ± this, where the classifier saturates."},
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "Second classifier, reported and never trained on; None: the embedded."},
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Training prompts: txt, jsonl, csv, hub id; None: embedded."},
    )
    eval_prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts, likewise; None: embedded."}
    )
    num_eval_prompts: int = field(default=256, metadata={"help": "Held-out prompts to use."})
    best_of_n: int = field(default=64, metadata={"help": "n of the best-of-n yardstick."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; None: torch's choice."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Leave the checkpoints of a finished run (for a sweep)."}
    )
    json: str | None = field(
        default=None,
        metadata={
            "help": "Write the numbers of summary.json here too; '-' is standard output, and "
            "everything else then goes to standard error."
        },
    )

    def check(self) -> None:
        """Refuses what nothing can be measured on: one prompt has no spread, one draw no best.

        Raises:
            ValueError: fewer than 2 held-out prompts or draws.
        """
        for name in ("num_eval_prompts", "best_of_n"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 2")


@dataclass
class _Run(WandbArguments):
    """The W&B run's name and rlkl's precision, before the settings of one of TRL's trainers."""

    def __post_init__(self) -> None:
        choose_precision(self)  # pyright: ignore[reportArgumentType] (with one of TRL's below)
        check_intervals(self)  # pyright: ignore[reportArgumentType]
        generations = self.num_generations  # pyright: ignore[reportAttributeAccessIssue]
        if generations is None or generations < 2:
            raise ValueError(
                f"num_generations is {generations}; a response is compared with the others to its "
                "prompt: give at least 2"
            )
        with warnings.catch_warnings():  # TRL's default has the older name
            message = ".gradient_checkpointing. is deprecated"
            warnings.filterwarnings("ignore", message, FutureWarning)
            super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue] (TRL's)
        for name in ("num_iterations", "max_completion_length", "max_steps"):
            value = getattr(self, name)
            if value is None or value == 0 or (value < 0 and name != "max_steps"):
                raise ValueError(f"{name} is {value}; it must be at least 1")
        from rlkl.trainers.trl.checks import check_settings  # TRL's trainers are slow to import

        check_settings(self)  # pyright: ignore[reportArgumentType] (with one of TRL's below)


@dataclass
class RLOOArguments(_Run, RLOOConfig):
    """trl.RLOOConfig with the W&B run's name; bf16 where the hardware multiplies it."""


@dataclass
class GRPOArguments(_Run, GRPOConfig):
    """trl.GRPOConfig, likewise."""
