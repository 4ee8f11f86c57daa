"""Ending a training that has diverged, before what it has become reaches a checkpoint."""

from pathlib import Path

from torch import Tensor
from transformers import TrainerState

from rlkl.trainers.resume import last_checkpoint


def check_finite(
    name: str, values: Tensor, state: TrainerState, output_dir: Path, if_diverged: str
) -> None:
    """Refuses values that are not finite.

    Args:
        name: what they are, for the complaint.
        values: any of them nan or infinite is one too many.
        state: how far the training is.
        output_dir: where its checkpoints are.
        if_diverged: what to begin again with.

    Raises:
        FloatingPointError: says what is not finite, after which step, and what to do.
    """
    bad = values.numel() - int(values.isfinite().sum())
    if bad == 0:
        return
    what = f"{bad} of {values.numel()} values" if values.numel() > 1 else f"{values.item()}"
    remedy = f"Begin again with {if_diverged}"
    saved = last_checkpoint(output_dir)
    if saved is not None:
        remedy += (
            f", or with it from the model in {saved}, the last checkpoint "
            "(resume_from_checkpoint goes on with the learning rate of its time)"
        )
    raise FloatingPointError(
        f"after step {state.global_step} {name} is not finite ({what}): training has "
        f"diverged. {remedy}"
    )
