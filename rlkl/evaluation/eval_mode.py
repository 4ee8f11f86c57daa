"""Models are measured without dropout, and get their mode back, whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Puts the models in eval mode and restores each one's mode, on errors too; None is skipped.

    Example:
        >>> model = nn.Dropout()
        >>> with eval_mode(model):
        ...     print(model.training)
        False
        >>> model.training
        True
    """
    given = [model for model in models if model is not None]
    modes = [model.training for model in given]
    for model in given:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(given, modes, strict=True):
            model.train(was_training)
