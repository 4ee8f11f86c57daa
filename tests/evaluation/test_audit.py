"""The audit's figures against what the tests of rlkl.kl prove, and its page."""

import itertools
import math
import re

import pytest
import torch
from matplotlib.figure import Figure

from rlkl.evaluation.audit import HT_DRAWS, Models, audit, models_from_json, random_models
from rlkl.evaluation.audit_page import audit_page, formatted, percent, verdict, who_sampled_off
from rlkl.kl import (
    ResponseStatistics,
    TabularLM,
    exact_kl,
    get_estimator,
    get_response_estimator,
    gradient_moments,
    value_moments,
)

KEYS = {
    "estimator",
    "placement",
    "sampling",
    "value_bias",
    "value_var",
    "grad_rel_err",
    "grad_cos",
    "grad_var",
}


@pytest.fixture(scope="module")
def record():
    return audit(random_models(4, 3, seed=0))


def row(record, sampling: str, **wanted):
    rows = [*record["rows"], *record["configurations"]]
    (found,) = (
        r
        for r in rows
        if r["sampling"] == sampling
        and ("name" in r) == ("name" in wanted)
        and all(r[key] == value for key, value in wanted.items())
    )
    return found


def test_rows_have_the_documented_keys(record):
    assert all(r.keys() == KEYS for r in record["rows"])
    assert all(r.keys() == KEYS | {"name", "note", "source"} for r in record["configurations"])


def test_rows_are_the_moments_of_the_enumeration(record):
    models = random_models(4, 3, seed=0)
    assert record["exact_kl"] == exact_kl(models.policy, models.ref).item()
    for name in ("k1", "k2", "k3", "rb"):
        value = value_moments(models.policy, models.ref, get_estimator(name))
        for placement in ("reward", "loss", "both"):
            r = row(record, "on", estimator=name, placement=placement)
            assert r["value_bias"] == pytest.approx(value.mean.item() - record["exact_kl"])
            assert r["value_var"] == pytest.approx(value.variance.item())
            gradient = gradient_moments(models.policy, models.ref, get_estimator(name), placement)
            assert r["grad_var"] == pytest.approx(gradient.variance.item())


def test_errors_agree_with_the_claims(record):
    for r in record["rows"]:
        if r["sampling"] == "on" and r["grad_rel_err"] is not None:
            claims = get_estimator(r["estimator"]).claims
            assert (abs(r["value_bias"]) < 1e-12) == claims.unbiased
            assert (r["grad_rel_err"] < 1e-9) == (r["placement"] in claims.exact_gradient)


def test_notes_say_exact_of_exact_gradients_alone(record):
    for r in record["configurations"]:
        exact = r["note"].startswith("exact")
        if r["sampling"] == "on":
            assert (r["grad_rel_err"] < 1e-9) == exact, r["name"]
        elif exact and "on its own samples" not in r["note"]:
            assert r["grad_rel_err"] < 1e-9, r["name"]
        if exact and not r["note"].startswith("exact gradient"):  # the value too
            assert abs(r["value_bias"]) < 1e-9 or "on its own samples" in r["note"], r["name"]


def test_an_older_policy_is_named_only_where_one_sampled(record):
    assert who_sampled_off(record).startswith("An older policy sampled; its effective sample size")
    policy, ref = (TabularLM.random(2, 2, eos=None, seed=i) for i in range(2))
    alone = audit(Models(policy, ref, policy))
    assert who_sampled_off(alone).startswith("The policy itself sampled again")
    assert "older policy sampled" not in audit_page(alone)


def test_off_policy_only_prefix_weights_stay_exact(record):
    for r in record["rows"]:
        if r["sampling"] == "off" and r["grad_rel_err"] is not None:
            exact = r["grad_rel_err"] < 1e-9 and abs(r["value_bias"]) < 1e-9
            assert exact == (r["placement"] == "both, prefix")
    assert 0 < record["ess_fraction"] < 1
    assert 0 < record["truncated_fraction"] < 1


def test_estimators_of_whole_responses_measure_on_and_off_policy(record):
    """Their best coefficients leave no more variance than rb's or k1's, which are two choices."""
    models = random_models(4, 3, seed=0)
    for sampling, plain, placement in (("on", "both", ""), ("off", "both, prefix", ", weighted")):
        least = {}
        for name in ("cv", "cv_fitted", "mcv", "mcv_positions"):
            r = row(record, sampling, estimator=name, placement=f"value only{placement}")
            assert abs(r["value_bias"]) < 1e-9
            assert r["grad_rel_err"] is r["grad_cos"] is r["grad_var"] is None
            least[name] = r["value_var"]
        rb = row(record, sampling, estimator="rb", placement=plain)["value_var"]
        assert least["mcv_positions"] < least["mcv"] < rb
    mask, index = models.policy.mask, models.policy.tokens.unsqueeze(-1)
    pi, q, mu = (
        torch.where(mask, lm.policy_logp().gather(-1, index).squeeze(-1), 0.0)
        for lm in (models.policy, models.ref, models.sampler)
    )
    weighted = ((pi - mu).cumsum(1).exp() * (pi - q)).sum(1)  # Σ_t W_{t+1} u_t
    value = weighted + (q - mu).sum(1).exp() - (pi - mu).sum(1).exp()
    prob = mu.sum(1).exp()
    variance = prob @ value**2 - (prob @ value) ** 2
    assert least["cv"] == pytest.approx(variance.item())


def test_horvitz_thompson_has_the_moments_of_all_ways_to_draw():
    models = random_models(2, 2, eos=1)
    prob = models.policy.response_logp().exp()
    log_ratio = models.policy.response_logp() - models.ref.response_logp()
    zeros = torch.zeros_like(prob)
    ht, moments = get_response_estimator("ht"), torch.zeros(2)
    for draws in itertools.product(range(len(prob)), repeat=HT_DRAWS):
        index = torch.tensor(draws)
        drawn = [x[index] for x in (log_ratio, zeros, zeros, zeros[:, None], prob.log())]
        estimate = ht(ResponseStatistics(*drawn), index).mean()
        moments = moments + prob[index].prod() * torch.stack([estimate, estimate**2])
    (row,) = (r for r in audit(models)["rows"] if r["estimator"].startswith("ht"))
    assert row["value_bias"] == pytest.approx(0, abs=1e-12)
    assert row["value_var"] == pytest.approx(HT_DRAWS * (moments[1] - moments[0] ** 2).item())


EXACT_ON = {
    "TRL RLOO",
    "TRL PPO (up to 1.12)",
    "verl, KL in reward (kl, k1)",
    "OpenRLHF, KL in reward (k1)",
    "KL-RB code, stepwise",
    "KL-RB code, Monte Carlo",
    "rlkl RaoBlackwellPPOTrainer",
    "rlkl RaoBlackwellPPOTrainer, prefix",
    "rlkl RaoBlackwellPPOTrainer, prefix_truncated at 1.5",
}
EXACT_OFF = {
    "KL-RB code, stepwise",
    "KL-RB code, Monte Carlo",
    "rlkl RaoBlackwellPPOTrainer, prefix",
}


def test_which_libraries_follow_the_true_gradient(record):
    for sampling, expected in (("on", EXACT_ON), ("off", EXACT_OFF)):
        rows = [r for r in record["configurations"] if r["sampling"] == sampling]
        assert {r["name"] for r in rows if r["grad_rel_err"] < 1e-9} == expected


def test_configurations_optimise_what_their_notes_say(record):
    """Each against the plain row, whose gradient has been identified in tests/kl."""

    def same(name: str, **plain):
        ours, theirs = row(record, "on", **plain), row(record, "on", name=name)
        for key in ("grad_rel_err", "grad_cos"):
            assert theirs[key] == pytest.approx(ours[key], abs=1e-9)

    forward = {"estimator": "k3", "placement": "loss"}
    token_level = {"estimator": "rb", "placement": "loss"}
    same("TRL GRPO, use_bias_correction_kl=False", **forward)
    same("verl, KL loss low_var_kl (k3)", **forward)
    same("OpenRLHF, KL loss k3", **forward)
    same("TRL GRPO (default)", **token_level)
    same("verl, KL loss k3+", **token_level)
    same("OpenRLHF, KL loss k2", **token_level)
    same("TRL PPO (up to 1.12), kl_estimator=k3", estimator="k3", placement="reward")


def test_the_shifted_form_varies_less_than_the_published_code(record):
    published = row(record, "on", name="KL-RB code, stepwise")["grad_var"]
    assert row(record, "on", name="rlkl RaoBlackwellPPOTrainer")["grad_var"] < published / 2


def test_a_model_against_itself_has_no_direction_to_miss():
    lm = TabularLM.random(3, 2)
    logits = lm.logits.tolist()
    record = audit(models_from_json({"length": 2, "eos": 0, "policy": logits, "ref": logits}))
    assert record["exact_kl"] == 0
    assert record["ess_fraction"] == 1
    for r in record["rows"]:
        assert r["value_bias"] == 0
        assert r["grad_rel_err"] is None
        assert r["grad_cos"] is None
    assert "–" in audit_page(record)


def test_models_from_json_reads_all_three():
    policy, ref, sampler = (TabularLM.random(2, 2, eos=None, seed=i) for i in range(3))
    record = {"length": 2, "eos": None}
    record |= {"policy": policy.logits.tolist(), "ref": ref.logits.tolist()}
    models = models_from_json(record | {"sampler": sampler.logits.tolist()})
    assert torch.equal(models.sampler.logits, sampler.logits)
    alone = models_from_json(record)
    assert alone.sampler is alone.policy
    assert models.policy.eos is None


GOOD = {"length": 1, "policy": [[0.0, 1.0]], "ref": [[0.0, 0.0]]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a model file has the keys"),
        ({"length": 1}, r"this has \['length'\]"),
        (GOOD | {"polcy": 1}, "polcy"),
        (GOOD | {"policy": "x"}, "policy is not a table of numbers"),
        (GOOD | {"ref": [1.0]}, "ref has 1 dimensions"),
        (GOOD | {"length": 2}, "make 3 prefixes"),
        (GOOD | {"length": "3"}, "length is '3'; it must be an integer"),
        (GOOD | {"length": 1.0}, "length is 1.0; it must be an integer"),
        (GOOD | {"length": 0}, "length 0"),
        (GOOD | {"length": 40, "policy": [[0.0] * 3]}, "use a smaller vocab or length"),
        (GOOD | {"eos": "a"}, "eos is 'a'"),
        (GOOD | {"eos": 2}, "eos is 2"),
        (GOOD | {"policy": [[0.0, math.nan]]}, "policy has logits that are not finite"),
        (GOOD | {"ref": [[0.0, -math.inf]]}, "ref has logits that are not finite"),
        (GOOD | {"policy": [[]]}, "vocab is 0"),
        (GOOD | {"policy": [[10**400]]}, "policy is not a table of numbers"),
        (GOOD | {"sampler": [[0.0] * 3]}, "sampler has logits of 3 tokens and policy of 2"),
    ],
)
def test_a_wrong_model_file_is_refused_by_what_is_wrong(record, message):
    with pytest.raises(ValueError, match=message):
        models_from_json(record)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 6), "use a smaller vocab or length"),
        ((10, 3), "use a smaller vocab or length"),
        ((45, 2), "use a smaller vocab or length"),
        ((1, 3), "vocab is 1"),
        ((3, 0), "length 0"),
    ],
)
def test_models_that_cannot_be_listed_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        random_models(*sizes)


@pytest.mark.parametrize("name", ["policy", "ref", "sampler"])
def test_models_whose_weights_leave_float64_are_refused(name):
    """Where a probability is rounded to 0 the other sums are not those of the models given."""
    models = {"policy": [[0.0, 1.0]], "ref": [[0.0, 0.0]], "sampler": [[0.0, 0.0]]}
    models = models_from_json(GOOD | models | {name: [[0.0, -346.0]]})
    with pytest.raises(ValueError, match=rf"{name} gives a response the probability 10\^-150.3"):
        audit(models)


@pytest.mark.parametrize("drift", [-20.0, 50.0])
def test_a_sampler_far_from_the_policy_is_measured_truly(drift):
    record = audit(random_models(4, 3, drift=drift))
    for r in record["rows"]:
        assert all(math.isfinite(x) for x in r.values() if isinstance(x, float))
        if r["placement"] == "both, prefix":
            assert r["value_bias"] == pytest.approx(0, abs=1e-12)
            assert r["grad_rel_err"] < 1e-12
    assert 0 < record["ess_fraction"] < 1e-30
    assert percent(record["ess_fraction"]) != "0%"
    assert percent(record["ess_fraction"]) in audit_page(record)


def test_the_page_is_whole_and_has_every_configuration(record):
    page = audit_page(record)
    assert page.startswith("<!doctype html>")
    assert page.count("<table>") == page.count("</table>") == 4
    for r in record["configurations"]:
        assert r["name"].replace("&", "&amp;") in page
    assert not re.search(r'(src|href)="http', page)
    assert "<svg" in page


def test_numbers_are_judged_and_rounding_is_zero():
    r = {"value_bias": 1e-17, "value_var": 2.0, "grad_rel_err": 0.1, "grad_cos": None}
    assert (formatted(r, "value_bias"), verdict(r, "value_bias", 1.0)) == ("0", "green")
    assert (formatted(r, "grad_rel_err"), verdict(r, "grad_rel_err", 1.0)) == ("0.1", "yellow")
    assert verdict(r | {"grad_rel_err": 0.5}, "grad_rel_err", 1.0) == "red"
    assert (formatted(r, "grad_cos"), verdict(r, "grad_cos", 1.0)) == ("–", "")
    assert verdict(r, "value_var", 1.0) == ""


def test_the_labels_of_the_picture_cover_neither_each_other_nor_a_point(monkeypatch):
    figures = list[Figure]()

    class Kept(Figure):
        def __init__(self, **settings):
            super().__init__(**settings)
            figures.append(self)

    monkeypatch.setattr("rlkl.evaluation.audit_page.Figure", Kept)
    audit_page(audit(random_models(4, 3, seed=0)))
    (axes,) = figures[0].axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 10
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(
            box.contains(*axes.transData.transform(line.get_xydata()[0])) for line in axes.lines
        )
