"""Settings that every trainer shares."""

import pytest
import torch

from rlkl.trainers import PPOConfig


@pytest.mark.parametrize(("tiles", "dots"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_bf16_is_the_default_where_a_cpu_multiplies_it(monkeypatch, tmp_path, tiles, dots):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(tiles))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(dots))

    def bf16(**settings: bool) -> bool | None:
        return PPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings).bf16

    assert bf16() == bool(tiles or dots)
    assert not bf16(bf16=False)
    assert bf16(bf16=True)
