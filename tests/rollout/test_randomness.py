"""Every part of a place and of a seed reaches the draws."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkl.rollout.randomness import generator_of

KEYS = st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(0, 3))


def draw(*key: int) -> list[float]:
    return torch.rand(8, generator=generator_of("cpu", *key)).tolist()


@given(KEYS, KEYS)
def test_draws_agree_only_where_seed_and_place_do(first, second):
    assert (draw(*first) == draw(*second)) == (first == second)


@pytest.mark.parametrize("bits", [8, 31, 32, 40])
def test_high_bits_of_a_seed_count(bits):
    assert draw(1 << bits, 3) != draw(0, 3)


def test_seeds_steps_and_purposes_never_share_a_stream():
    keys = list(itertools.product(range(20), range(50), range(3)))
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_streams_of_neighbouring_seeds_are_uncorrelated():
    rows = torch.stack(
        [torch.rand(4096, generator=generator_of("cpu", seed, 0)) for seed in range(8)]
    )
    off_diagonal = torch.corrcoef(rows) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / 4096**0.5
