"""Standard errors from sums per unit, against formulas on all the responses."""

import pytest
import torch

from rlkl.evaluation.kl_estimate.units import MAX_UNITS, Estimand, Units, UnitSums, ratio
from rlkl.kl import mean_and_stderr, per_token_mean_and_stderr

POPULATION, GIVEN = Estimand.POPULATION, Estimand.GIVEN_PROMPTS


def sums_of(units: Units, values: torch.Tensor, lengths: torch.Tensor | None = None) -> UnitSums:
    """Sums of values [prompts, responses], added response by response."""
    sums = UnitSums(units)
    for repetition in range(values.shape[1]):
        prompt = torch.arange(len(values))
        unit = units.index(prompt, torch.full_like(prompt, repetition))
        row = {"n": torch.ones(len(values)), "x": values[:, repetition]}
        if lengths is not None:
            row["length"] = lengths[:, repetition]
        sums.add(unit, row)
    return sums


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_one_response_per_prompt_is_the_ordinary_standard_error():
    values, units = random(50, 1), Units.of(50, POPULATION)
    sums = sums_of(units, values)
    interval = ratio(sums["x"], sums["n"], sums["n"], units)
    mean, stderr = mean_and_stderr(values[:, 0])
    assert float(interval.mean) == pytest.approx(float(mean))
    assert float(interval.stderr) == pytest.approx(float(stderr))
    assert float(interval.half_width) == pytest.approx(2.0096 * float(stderr), rel=1e-4)


def test_several_responses_per_prompt_count_as_one_draw_of_the_population():
    values = random(40, 5) + 3 * random(40, 1)
    units = Units.of(40, POPULATION)
    sums = sums_of(units, values)
    interval = ratio(sums["x"], sums["n"], sums["n"], units)
    _, stderr = mean_and_stderr(values.mean(1))
    assert float(interval.stderr) == pytest.approx(float(stderr))
    assert float(interval.stderr) > 1.5 * float(mean_and_stderr(values.flatten()).stderr)


def test_per_token_is_the_ratio_of_sums_with_its_error():
    values, lengths = random(30, 1), 1 + (10 * random(30, 1).abs()).floor()
    units = Units.of(30, POPULATION)
    sums = sums_of(units, values, lengths)
    interval = ratio(sums["x"], sums["length"], sums["n"], units)
    width = int(lengths.max())
    mask = torch.arange(width) < lengths
    k = torch.zeros(30, width, dtype=torch.float64)
    k[:, 0] = values[:, 0]
    mean, stderr = per_token_mean_and_stderr(k, mask)
    assert float(interval.mean) == pytest.approx(float(mean))
    assert float(interval.stderr) == pytest.approx(float(stderr))


def test_given_prompts_leave_out_how_prompts_differ():
    values = random(40, 64) + 100 * random(40, 1)
    units = Units.of(40, GIVEN)
    sums = sums_of(units, values)
    interval = ratio(sums["x"], sums["n"], sums["n"], units)
    stratified = (values.var(1) / 64).mean().sqrt() / 40**0.5
    # Two units per prompt estimate each prompt's variance with 1 degree of freedom: 40 in all.
    assert float(interval.stderr) == pytest.approx(float(stratified), rel=0.3)


def test_one_prompt_is_a_given_one_and_its_responses_are_the_units():
    values, units = random(1, 640), Units.of(1, POPULATION)
    assert units.estimand is GIVEN
    sums = sums_of(units, values)
    interval = ratio(sums["x"], sums["n"], sums["n"], units)
    assert float(interval.stderr) == pytest.approx(float(values.std()) / 640**0.5, rel=0.25)


def test_more_prompts_than_units_share_them_and_the_error_stays():
    prompts = 4 * MAX_UNITS
    values, units = random(prompts, 1), Units.of(prompts, POPULATION)
    assert len(units) == MAX_UNITS
    sums = sums_of(units, values)
    interval = ratio(sums["x"], sums["n"], sums["n"], units)
    expected = float(mean_and_stderr(values[:, 0]).stderr)
    assert float(interval.stderr) == pytest.approx(expected, rel=4 / (2 * MAX_UNITS) ** 0.5)


@pytest.mark.parametrize("units", [Units.of(9, POPULATION), Units.of(9, GIVEN)])
def test_a_single_response_says_nothing_of_its_error(units):
    sums = UnitSums(units)
    sums.add(units.index(torch.tensor([3]), torch.tensor([0])), {"n": torch.ones(1)})
    interval = ratio(sums["n"], sums["n"], sums["n"], units)
    assert float(interval.mean) == 1.0
    assert interval.stderr.isinf()
    assert interval.half_width.isinf()


def test_unequal_numbers_of_responses_still_give_every_given_prompt_its_variance():
    """Prompts 0 to 9 have four responses, the others three: no unit is left with none."""
    values, units = random(40, 4), Units.of(40, GIVEN)
    sums = UnitSums(units)
    for repetition in range(4):
        prompt = torch.arange(40 if repetition < 3 else 10)
        unit = units.index(prompt, torch.full_like(prompt, repetition))
        row = {"n": torch.ones(len(prompt)), "x": values[: len(prompt), repetition]}
        sums.add(unit, row)
    interval = ratio(sums["x"], sums["n"], sums["n"], units)
    assert float(interval.stderr) == pytest.approx(1 / 130**0.5, rel=0.35)


def test_positions_of_later_batches_may_be_longer_or_shorter():
    sums = UnitSums(Units.of(2, POPULATION))
    sums.add(torch.tensor([0]), {"x": torch.ones(1, 1)})
    sums.add(torch.tensor([1]), {"x": torch.ones(1, 3)})
    sums.add(torch.tensor([1]), {"x": torch.ones(1, 2)})
    assert sums["x"].tolist() == [[1.0, 0.0, 0.0], [2.0, 2.0, 1.0]]
