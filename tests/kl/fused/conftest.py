"""Small tiles and more than one thread, for the fused functions."""

from collections.abc import Iterator

import pytest
import torch

from rlkl.kl.fused import engine, heads, tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and slices that do not divide the sizes used here."""
    monkeypatch.setattr(engine, "_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(heads, "_VOCAB_SLICE", 32)
    monkeypatch.setattr(tiles, "_TILE_ROWS", 10)
    monkeypatch.setattr(tiles, "_TILE_ELEMENTS", 400)


@pytest.fixture(params=[1, 2], ids="threads{}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
