"""Settings that several test packages share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

MATHEMATICS = {Path(__file__).parent / "kl", Path(__file__).parent / "rl"}


@pytest.fixture(autouse=True)
def _float64_in_mathematics(request: pytest.FixtureRequest) -> Iterator[None]:
    """Formulas are checked in float64; models (every other folder) run in their own float32."""
    if request.path.parent not in MATHEMATICS:
        yield
        return
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
