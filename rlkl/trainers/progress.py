"""A progress bar with what a step measured, and a Ctrl-C that loses nothing."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlkl.trainers.processes import of_all


class ClosingCallback(TrainerCallback):
    """A callback that takes something while training runs (the screen, a signal) and gives it back.

    transformers tells its callbacks of the end of a training, not of one that raised; inside
    `closing_callbacks` both close them.
    """

    def close(self) -> None:
        """Gives back what was taken; nothing if it was given back already."""
        raise NotImplementedError

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Gives it back."""
        self.close()


@contextmanager
def closing_callbacks(trainer: Trainer) -> Iterator[None]:
    """Closes the trainer's callbacks when the block ends, whether it raises or not."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ClosingCallback):
                callback.close()


def reward_and_kl(logs: dict[str, float]) -> str | None:
    """What a PPO step measured: reward and KL with their standard errors."""
    if "objective/scores" not in logs:
        return None
    reward, reward_se = logs["objective/scores"], logs["objective/scores_se"]
    kl, kl_se = logs["kl/rb"], logs["kl/rb_se"]
    return f"reward {reward:+.2f} ± {reward_se:.2f}   KL {kl:.2f} ± {kl_se:.2f} nats"


class RichProgress(ClosingCallback):
    """One line: steps done, what the last logged step measured, time left.

    Args:
        console: where to draw; None: standard output.
        title: what stands before the bar.
        describe: from a step's log to the text that is shown; None leaves the last one.
    """

    def __init__(
        self,
        console: Console | None = None,
        title: str = "PPO",
        describe: Callable[[dict[str, float]], str | None] = reward_and_kl,
    ) -> None:
        self.console = console or Console()
        self.title, self.describe = title, describe
        self.progress: Progress | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Opens the bar, in the first process."""
        if not state.is_world_process_zero:
            return
        self.progress = progress = Progress(
            TextColumn(self.title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        progress.start()
        self.task = progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, measured=""
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
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
            if (measured := self.describe(logs or {})) is not None:
                self.progress.update(self.task, measured=measured)

    def close(self) -> None:
        """Closes the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StopOnInterrupt(ClosingCallback):
    """The first Ctrl-C ends training after the step in work, with a checkpoint; the second at
    once.

    Of several processes one that was told tells the others.
    """

    def __init__(self) -> None:
        self.requested = False
        self._listening = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Listens for Ctrl-C."""
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._listening = True

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
        if any(of_all(self.requested)):
            control.should_save = True
            control.should_training_stop = True

    def close(self) -> None:
        """Gives the signal back."""
        if self._listening:
            signal.signal(signal.SIGINT, self._before)
            self._listening = False
