"""Fixed and adaptive KL coefficients."""

import json
import math

import pytest

from rlkl.kl import AdaptiveKLCoefficient, FixedKLCoefficient


def test_a_fixed_coefficient_stays():
    coefficient = FixedKLCoefficient(0.05)
    coefficient.update(kl=100.0, n=64)
    assert coefficient.value == 0.05


def test_zero_is_a_fixed_coefficient():
    assert FixedKLCoefficient(0.0).value == 0


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_coefficient_that_is_negative_or_not_finite_is_refused_with_the_remedy(value):
    with pytest.raises(ValueError, match=r"must be finite and >= 0 .*use 0 for no penalty"):
        FixedKLCoefficient(value)
    with pytest.raises(ValueError, match="initial is"):
        AdaptiveKLCoefficient(value, target=6.0, horizon=10_000)


@pytest.mark.parametrize("name", ["initial", "target", "horizon"])
def test_an_adaptive_coefficient_needs_positive_settings(name):
    settings = {"initial": 0.1, "target": 6.0, "horizon": 10_000} | {name: 0}
    if name != "horizon":
        settings[name] = 0.0
    with pytest.raises(ValueError, match=f"{name} is 0"):
        AdaptiveKLCoefficient(**settings)


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-1.0, -0.2)]
)
def test_the_error_is_relative_and_clipped_at_a_fifth(kl, error):
    coefficient = AdaptiveKLCoefficient(0.1, target=6.0, horizon=1000)
    coefficient.update(kl, n=500)
    assert coefficient.value == pytest.approx(0.1 * (1 + error / 2))


def test_the_coefficient_steers_the_kl_to_its_target():
    """A policy whose KL is 1/β settles where 1/β is the target."""
    coefficient = AdaptiveKLCoefficient(1.0, target=8.0, horizon=1000)
    for _ in range(500):
        coefficient.update(1 / coefficient.value, n=100)
    assert 1 / coefficient.value == pytest.approx(8.0, rel=1e-3)


def test_a_resumed_run_goes_on_with_the_coefficient_it_had():
    coefficient = AdaptiveKLCoefficient(0.1, target=6.0, horizon=1000)
    coefficient.update(12.0, n=100)
    state = json.loads(json.dumps(coefficient.state_dict()))
    resumed = AdaptiveKLCoefficient(0.1, target=6.0, horizon=1000)
    resumed.load_state_dict(state)
    for c in (coefficient, resumed):
        c.update(3.0, n=100)
    assert resumed.value == coefficient.value


def test_a_checkpoint_with_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match=r"state\['value'\] is -1"):
        FixedKLCoefficient(0.1).load_state_dict({"value": -1.0})


def test_an_update_that_would_lose_the_coefficient_is_refused():
    coefficient = AdaptiveKLCoefficient(0.1, target=6.0, horizon=100)
    with pytest.raises(ValueError, match="kl is nan"):
        coefficient.update(math.nan, n=10)
    with pytest.raises(ValueError, match="n is 500 with a horizon of 100"):
        coefficient.update(6.0, n=500)
    assert coefficient.value == 0.1
