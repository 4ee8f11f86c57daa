"""Claims of the response-level estimators, over all ways of drawing a few responses.

A model with three or four responses has so few sets of draws that the expectation of an estimate,
cross-fitting included, is a finite sum.
"""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rlkl.kl import (
    RESPONSE_ESTIMATORS,
    ControlMoments,
    ControlVariateEstimator,
    HorvitzThompson,
    ResponseStatistics,
    TabularLM,
    exact_kl,
    get_estimator,
    get_response_estimator,
    response_statistics,
    response_weights,
    value_moments,
)
from rlkl.kl.control_moments import fit_coefficients

EXACT, FALSE = 1e-12, 1e-3
CONTROLLED = [n for n, e in RESPONSE_ESTIMATORS.items() if isinstance(e, ControlVariateEstimator)]
every_estimator = pytest.mark.parametrize("name", RESPONSE_ESTIMATORS)
every_controlled = pytest.mark.parametrize("name", CONTROLLED)


def controlled(name: str) -> ControlVariateEstimator:
    estimator = get_response_estimator(name)
    assert isinstance(estimator, ControlVariateEstimator)
    return estimator


def token_logp(lm: TabularLM) -> Tensor:
    return lm.policy_logp().gather(-1, lm.tokens.unsqueeze(-1)).squeeze(-1)


def every_response(
    policy: TabularLM, ref: TabularLM, sampler: TabularLM | None = None
) -> ResponseStatistics:
    """Statistics of each response that there is."""
    return response_statistics(
        token_logp(policy),
        token_logp(ref),
        get_estimator("rb")(policy.policy_logp(), ref.policy_logp(), policy.tokens, policy.mask),
        policy.mask,
        sampler_token_logp=None if sampler is None else token_logp(sampler),
    )


def rows(statistics: ResponseStatistics, index: Tensor) -> ResponseStatistics:
    return ResponseStatistics(*(None if x is None else x[index] for x in statistics))


def all_draws(sampler: TabularLM, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sequence of `count` independent draws, with its probability."""
    prob = sampler.response_logp().exp()
    for draws in itertools.product(range(len(prob)), repeat=count):
        index = torch.tensor(draws)
        yield index, prob[index].prod()


def expected(name: str, statistics: ResponseStatistics, sampler: TabularLM, groups: Tensor):
    """E[estimate] over all draws; `ht` is told which draws are equal, the others their folds."""
    estimator = get_response_estimator(name)
    total = torch.zeros(())
    for index, prob in all_draws(sampler, len(groups)):
        told = index if isinstance(estimator, HorvitzThompson) else groups
        total = total + prob * estimator(rows(statistics, index), told).mean()
    return total


@pytest.fixture(params=[0, 1], ids="models{}".format)
def tiny(request: pytest.FixtureRequest) -> tuple[TabularLM, TabularLM, TabularLM]:
    """Policy, reference and another sampler, of three responses: 1, 01, 00."""
    return tuple(TabularLM.random(2, 2, eos=1, seed=3 * request.param + i) for i in range(3))


FOLDS = {
    "pairs": torch.tensor([0, 1]),
    "triples": torch.tensor([0, 0, 1]),
    "four": torch.tensor([0, 1, 2, 0]),
}


@every_estimator
@pytest.mark.parametrize("groups", FOLDS.values(), ids=FOLDS.keys())
def test_unbiased_claim_for_every_number_of_responses(name, groups, tiny):
    policy, ref, _ = tiny
    assert get_response_estimator(name).claims.unbiased
    mean = expected(name, every_response(policy, ref), policy, groups)
    assert abs(mean / exact_kl(policy, ref) - 1) < EXACT


@every_controlled
def test_unbiased_for_responses_that_the_policy_cannot_give(name, tiny):
    """Their weight is 0 and their log-ratio infinite; of w - 1 the reference's share is left."""
    policy, ref, sampler = tiny
    logits = policy.logits.clone()
    logits[1, 0] = -torch.inf
    policy = policy.with_logits(logits)
    statistics = every_response(policy, ref, sampler)
    mean = expected(name, statistics, sampler, FOLDS["triples"])
    assert abs(mean / exact_kl(policy, ref) - 1) < EXACT


@every_controlled
def test_unbiased_for_responses_of_another_policy(name, tiny):
    policy, ref, sampler = tiny
    statistics = every_response(policy, ref, sampler)
    mean = expected(name, statistics, sampler, FOLDS["triples"])
    assert abs(mean / exact_kl(policy, ref) - 1) < EXACT


@pytest.mark.parametrize("name", ["cv_fitted", "mcv", "mcv_positions"])
def test_coefficients_fitted_to_their_own_responses_would_bias(name, tiny):
    policy, ref, _ = tiny
    estimator, statistics = controlled(name), every_response(policy, ref)
    total = torch.zeros(())
    for index, prob in all_draws(policy, 4):
        anchor, controls = estimator.terms(rows(statistics, index))
        moments = ControlMoments.zeros(controls=controls.shape[1], folds=1, prompts=1)
        zeros = torch.zeros_like(index)
        moments.add(anchor, controls, fold=zeros, prompt=zeros)
        fitted = fit_coefficients(moments.responses[0], estimator.shrinkage)
        total = total + prob * (anchor + controls @ fitted).mean()
    assert abs(total / exact_kl(policy, ref) - 1) > FALSE


@every_estimator
def test_non_negative_claim(name):
    """The lowest value of any draw, over five models of three responses and all sets of draws."""
    estimator, values = get_response_estimator(name), []
    for seed in range(5):
        policy, ref = (TabularLM.random(2, 2, eos=1, seed=2 * seed + i) for i in range(2))
        statistics = every_response(policy, ref)
        for index, _ in all_draws(policy, 3):
            told = index if isinstance(estimator, HorvitzThompson) else FOLDS["triples"]
            values.append(estimator(rows(statistics, index), told).min().item())
    assert min(values) >= 0 if estimator.claims.non_negative else min(values) < -FALSE


@every_estimator
def test_needs_claim(name, pair):
    """What an estimator does not need may be anything."""
    estimator, statistics = get_response_estimator(name), every_response(*pair)
    groups = torch.arange(len(statistics.log_ratio)) % 4
    used = {
        "log_ratio": {"log_ratio", "excess"},
        "token_kl": {"token_kl", "martingale"},
        "response_logp": {"log_ratio", "policy_logp"},
    }[estimator.claims.needs]
    nothing = {field: torch.full_like(getattr(statistics, field), torch.nan)
               for field in statistics._fields if field not in used}  # fmt: skip
    blinded = estimator(statistics._replace(**nothing), groups)
    assert torch.equal(blinded, estimator(statistics, groups))


@every_estimator
def test_kl_of_a_model_from_itself_is_exactly_zero(name, pair):
    statistics = every_response(pair.policy, pair.policy)
    groups = torch.arange(len(statistics.log_ratio)) % 4
    assert get_response_estimator(name)(statistics, groups).eq(0).all()


# --- variance -----------------------------------------------------------------------------------


def best_moments(name: str, policy: TabularLM, ref: TabularLM) -> tuple[float, float, Tensor]:
    """Mean, variance and coefficients of the estimator's best form, by exact sums."""
    prob = policy.response_logp().exp()
    anchor, controls = controlled(name).terms(every_response(policy, ref))
    z = torch.cat([torch.ones_like(anchor)[:, None], anchor[:, None], controls], 1)
    coefficients = fit_coefficients(z.T @ (prob[:, None] * z))
    values = anchor + controls @ coefficients
    mean = prob @ values
    return mean.item(), (prob @ (values - mean).square()).item(), coefficients


def test_two_steps_where_rb_varies_more_than_k1_and_mcv_less_than_either(two_steps):
    """The numbers of the docstrings of RaoBlackwellEstimator and of this module."""
    k1, rb = (value_moments(*two_steps, get_estimator(name)).variance for name in ("k1", "rb"))
    mean, one, _ = best_moments("mcv", *two_steps)
    per_step_mean, per_step, _ = best_moments("mcv_positions", *two_steps)
    assert [round(x, 5) for x in (mean, k1.item(), rb.item(), one)] == [
        2.39545,
        3.31591,
        5.06974,
        2.94458,
    ]
    assert per_step < 1e-24
    assert per_step_mean == pytest.approx(exact_kl(*two_steps).item(), rel=EXACT)


def test_with_its_best_coefficient_mcv_is_worse_than_neither_k1_nor_rb(pair):
    k1, rb = (value_moments(*pair, get_estimator(name)).variance for name in ("k1", "rb"))
    _, one, _ = best_moments("mcv", *pair)
    _, positions, _ = best_moments("mcv_positions", *pair)
    assert positions <= one <= min(k1, rb)
    _, fitted, _ = best_moments("cv_fitted", *pair)
    assert fitted <= k1


def test_best_coefficients_are_those_of_least_squares(pair):
    prob = pair.policy.response_logp().exp()
    anchor, controls = controlled("mcv_positions").terms(every_response(*pair))
    _, _, coefficients = best_moments("mcv_positions", *pair)
    root = prob.sqrt()[:, None]
    design = torch.cat([torch.ones_like(anchor)[:, None], controls], 1)
    solution = torch.linalg.lstsq(root * design, -root * anchor[:, None]).solution[1:, 0]
    torch.testing.assert_close(coefficients, solution)


def test_sampled_responses_reach_the_variance_of_the_best_coefficient(two_steps):
    """Cross-fitted on 4000 draws: within 5 standard errors, and close to the best variance."""
    policy, ref = two_steps
    prob = policy.response_logp().exp()
    draws = torch.multinomial(prob, 4000, True, generator=torch.Generator().manual_seed(0))
    statistics = rows(every_response(policy, ref), draws)
    fold = torch.arange(4000) % 5
    for name, best in (("mcv", 2.94458), ("mcv_positions", 0.0)):
        values = controlled(name)(statistics, fold)
        error = abs(values.mean() - exact_kl(policy, ref)).item()
        assert error < 5 * (best / 4000) ** 0.5 + 1e-3
        assert abs(values.var().item() - best) < 0.1


# --- moments ------------------------------------------------------------------------------------


def drawn(pair, count: int) -> tuple[ResponseStatistics, Tensor, Tensor]:
    """Draws with a fold and a prompt each: prompts of 7 or fewer responses, whole in a fold."""
    prob = pair.policy.response_logp().exp()
    draws = torch.multinomial(prob, count, True, generator=torch.Generator().manual_seed(1))
    prompt = torch.arange(count) // 7
    return rows(every_response(*pair), draws), prompt % 3, prompt


@every_controlled
def test_moments_give_mean_and_errors_of_the_values_by_their_definitions(name, pair):
    estimator = controlled(name)
    statistics, fold, prompt = drawn(pair, 60)
    anchor, controls = estimator.terms(statistics)
    moments = ControlMoments.zeros(controls=controls.shape[1], folds=3, prompts=20)
    moments.add(anchor, controls, fold=fold, prompt=prompt)
    estimate = estimator.estimate(moments)

    values = estimator(statistics, fold)
    torch.testing.assert_close(estimate.mean, values.mean())
    torch.testing.assert_close(estimate.stderr, values.std() / math.sqrt(60))
    groups = [values[prompt == g] for g in range(int(prompt.max()) + 1)]
    between = sum((x.sum() - values.mean() * len(x)) ** 2 for x in groups)
    clustered = (between * len(groups) / (len(groups) - 1)).sqrt() / 60
    torch.testing.assert_close(estimate.clustered_stderr, clustered)


@every_controlled
def test_moments_of_batches_and_of_machines_add(name, pair):
    estimator = controlled(name)
    statistics, fold, prompt = drawn(pair, 60)
    anchor, controls = estimator.terms(statistics)

    def moments(*parts: slice) -> ControlMoments:
        result = ControlMoments.zeros(controls=controls.shape[1], folds=3, prompts=9)
        for p in parts:
            result.add(anchor[p], controls[p], fold=fold[p], prompt=prompt[p])
        return result

    whole = moments(slice(60))
    for other in (
        moments(slice(50, 60), slice(0, 13), slice(13, 50)),
        moments(slice(0, 30)) + moments(slice(30, 60)),
    ):
        torch.testing.assert_close(estimator.estimate(other), estimator.estimate(whole))
    assert whole.count == 60


def test_a_plain_average_needs_no_controls():
    x = torch.tensor([1.0, 3.0, 5.0])
    moments = ControlMoments.zeros(controls=0, folds=1, prompts=2)
    zeros = torch.zeros(3, dtype=torch.long)
    moments.add(x, x.new_zeros(3, 0), fold=zeros, prompt=torch.tensor([0, 0, 1]))
    estimate = moments.estimate(torch.zeros(1, 0))
    assert estimate.mean == 3
    assert estimate.stderr.item() == pytest.approx(2 / math.sqrt(3))
    # Prompts: sums 4 of 2 responses and 5 of 1; residuals -2 and 2
    assert estimate.clustered_stderr.item() == pytest.approx(math.sqrt(8 * 2) / 3)


def test_one_response_or_one_prompt_says_nothing_of_the_spread():
    zeros = torch.zeros(1, dtype=torch.long)
    moments = ControlMoments.zeros(controls=0, folds=1, prompts=3)
    moments.add(torch.ones(1), torch.ones(1, 0), fold=zeros, prompt=zeros)
    assert moments.estimate(torch.zeros(1, 0))[:3] == (1, math.inf, math.inf)
    moments.add(torch.zeros(1), torch.ones(1, 0), fold=zeros, prompt=zeros)
    mean, stderr, clustered, _ = moments.estimate(torch.zeros(1, 0))
    assert (mean, stderr, clustered) == (0.5, 0.5, math.inf)


def test_a_mean_of_nothing_is_refused():
    moments = ControlMoments.zeros(controls=0, folds=1, prompts=1)
    with pytest.raises(ValueError, match="no response yet"):
        moments.estimate(torch.zeros(1, 0))
    with pytest.raises(ValueError, match="folds is 0"):
        ControlMoments.zeros(controls=0, folds=0, prompts=1)


def test_shrinkage_draws_coefficients_to_the_common_one(pair):
    statistics, fold, prompt = drawn(pair, 60)
    anchor, controls = controlled("mcv_positions").terms(statistics)
    moments = ControlMoments.zeros(controls=controls.shape[1], folds=3, prompts=20)
    moments.add(anchor, controls, fold=fold, prompt=prompt)
    gram = moments.responses.sum(0)
    free, shrunk, common = (fit_coefficients(gram, s) for s in (0.0, 10.0, 1e9))
    summed = controls.sum(1)
    one = -(summed @ (anchor - anchor.mean())) / summed.square().sum()
    torch.testing.assert_close(common, one.expand(3), rtol=1e-6, atol=0)
    distances = [(c - one).norm().item() for c in (common, shrunk, free)]
    assert distances == sorted(distances)
    never_varied = torch.cat([controls, torch.zeros(60, 1)], 1)  # a position that no response has
    z = torch.cat([torch.ones(60, 1), anchor[:, None], never_varied], 1)
    torch.testing.assert_close(fit_coefficients(z.T @ z)[-1], one)


def test_with_nothing_to_fit_to_the_anchor_stands_alone(pair):
    statistics, *_ = drawn(pair, 5)
    values = controlled("mcv")(statistics, torch.zeros(5, dtype=torch.long))
    assert torch.equal(values, statistics.token_kl)


# --- Horvitz-Thompson ---------------------------------------------------------------------------


def test_ht_is_the_sum_over_distinct_responses(pair):
    policy, ref = pair
    index = torch.tensor([3, 3, 7, 0, 3])
    prob, ratio = policy.response_logp().exp(), policy.response_logp() - ref.response_logp()
    expected_sum = sum(prob[y] / (1 - (1 - prob[y]) ** 5) * ratio[y] for y in (3, 7, 0))
    ht = get_response_estimator("ht")
    statistics = rows(every_response(policy, ref), index)
    torch.testing.assert_close(ht(statistics, index).mean(), expected_sum)


def test_ht_of_improbable_responses_is_k1():
    logp = torch.tensor([-400.0, -2000.0, -0.0])
    zeros = torch.zeros(3)
    statistics = ResponseStatistics(torch.ones(3), zeros, zeros, zeros[:, None], logp)
    values = get_response_estimator("ht")(statistics, torch.arange(3))
    assert values.tolist() == [1, 1, 3]  # and a certain one counts for all three draws


def test_ht_of_a_certain_response_bears_a_rounding_error_above_one():
    zeros = torch.zeros(2)
    statistics = ResponseStatistics(
        torch.ones(2), zeros, zeros, zeros[:, None], torch.tensor([3e-8, 3e-8])
    )
    assert get_response_estimator("ht")(statistics, torch.tensor([0, 0])).tolist() == [1, 1]


def test_ht_refuses_responses_of_another_policy(tiny):
    statistics = every_response(*tiny)
    with pytest.raises(ValueError, match="use mcv"):
        get_response_estimator("ht")(statistics, torch.arange(3))


# --- other policies -----------------------------------------------------------------------------


def test_statistics_of_the_policys_own_responses_are_those_without_weights(pair):
    weighted = every_response(*pair, pair.policy)
    plain = every_response(*pair)
    assert weighted.policy_logp is None
    for field in ("log_ratio", "excess", "token_kl", "martingale"):
        torch.testing.assert_close(getattr(weighted, field), getattr(plain, field))


def test_the_control_of_cv_is_weighted_by_the_whole_response(tiny):
    policy, ref, sampler = tiny
    weights = response_weights(token_logp(policy), token_logp(sampler), policy.mask)
    excess = (ref.response_logp() - policy.response_logp()).expm1()
    torch.testing.assert_close(every_response(*tiny).excess, weights * excess)


def test_unknown_response_estimator_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'rb' is unknown; use one of cv, cv_fitted, mcv"):
        get_response_estimator("rb")
