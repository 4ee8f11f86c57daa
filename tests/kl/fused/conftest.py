"""Small tiles and more than one thread, for the fused functions."""

from collections.abc import Iterator

import pytest
import torch

from rlkl.kl.fused import buffers, heads, problem, tiles, torch_rows, workers


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and slices that do not divide the sizes used here."""
    monkeypatch.setattr(buffers, "_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(heads, "_VOCAB_SLICE", 32)
    monkeypatch.setattr(tiles, "_TILE_ROWS", 10)
    monkeypatch.setattr(tiles, "_TILE_ELEMENTS", 400)
    monkeypatch.setattr(tiles, "_SMALLEST_TILE", 300)


@pytest.fixture(params=["threads1", "threads2", "workers2"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """One thread, two, or two of the engine's own for torch's passes too (a large vocabulary)."""
    if request.param == "workers2":
        monkeypatch.setattr(problem, "_LARGE_VOCAB", 0)
        monkeypatch.setattr(workers, "_PIECE_COLUMNS", (7, 30))
    before, count = torch.get_num_threads(), int(request.param[-1])
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes over rows that Numba compiles, or torch's in their place."""
    if request.param == "torch":
        monkeypatch.setattr(problem, "row_passes", lambda device, dtype: torch_rows)
