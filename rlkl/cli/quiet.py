"""Leaving the screen to a command's own progress and results."""

import warnings

from datasets import disable_progress_bars
from transformers.utils import logging


def quiet_libraries() -> None:
    """No progress bars, notices and warnings of the libraries below."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")
