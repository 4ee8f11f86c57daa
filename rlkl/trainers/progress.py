"""A progress bar with reward and KL, and a Ctrl-C that loses nothing."""

import signal
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RichProgress(TrainerCallback):
    """One line: steps done, reward and KL of the last step with their standard errors, time
    left.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress: Progress | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Opens the bar."""
        self.progress = progress = Progress(
            TextColumn("PPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        progress.start()
        self.task = progress.add_task(
            "PPO", total=state.max_steps, completed=state.global_step, measured=""
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Moves the bar and shows what the step measured."""
        if self.progress is not None and logs and "objective/scores" in logs:
            reward, reward_se = logs["objective/scores"], logs["objective/scores_se"]
            kl, kl_se = logs["kl/rb"], logs["kl/rb_se"]
            measured = f"reward {reward:+.2f} ± {reward_se:.2f}   KL {kl:.2f} ± {kl_se:.2f} nats"
            self.progress.update(self.task, completed=state.global_step, measured=measured)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Closes the bar."""
        if self.progress is not None:
            self.progress.stop()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the step in work, with a checkpoint; the second at
    once.
    """

    def __init__(self) -> None:
        self.requested = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Listens for Ctrl-C."""
        self._before = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Saves and stops if asked to."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Gives the signal back."""
        signal.signal(signal.SIGINT, self._before)
