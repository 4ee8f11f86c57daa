"""Pairs of tabular language models: V = 4, T = 3, EOS, variable length; and a counterexample."""

from typing import NamedTuple

import pytest
import torch

from rlkl.kl import TabularLM


class Pair(NamedTuple):
    """A policy and its reference."""

    policy: TabularLM
    ref: TabularLM


@pytest.fixture(params=[0, 1, 2], ids="models{}".format)
def pair(request: pytest.FixtureRequest) -> Pair:
    seed = request.param
    return Pair(TabularLM.random(4, 3, seed=2 * seed), TabularLM.random(4, 3, seed=2 * seed + 1))


@pytest.fixture
def two_steps() -> Pair:
    """Two tokens, two steps, no EOS: the sampled ratio of step 1 foretells the KL of step 2."""
    policy = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.01, 0.99]])
    ref = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.99, 0.01]])
    return Pair(TabularLM(policy.log(), 2, eos=None), TabularLM(ref.log(), 2, eos=None))
