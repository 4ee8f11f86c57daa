"""Replay: given responses are scored as sampled ones are, weighted where the sampler is known."""

import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import t

from rlkl.evaluation.kl_estimate import (
    KLEstimation,
    KLReport,
    ReplayedResponses,
    SampledResponses,
    Settings,
)
from rlkl.evaluation.kl_estimate.accumulate import Weights
from rlkl.evaluation.kl_estimate.measure import measure
from rlkl.evaluation.kl_estimate.page import _limits, write_page
from rlkl.models import ModelPair

PROMPTS = ["red", "green blue red", "blue green", "green"]
T = 3


def replay(pair: ModelPair, path, **settings) -> KLReport:
    run = KLEstimation(pair, ReplayedResponses(pair, path, batch_size=512), Settings(**settings))
    while not run.done:
        run.step()
    return run.report()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sampled_rows(model, tokenizer, count: int) -> list[dict]:
    """Rows of responses of `model`, with its log-probs per token."""
    pair = ModelPair.of(model, model, tokenizer)
    source = SampledResponses(
        pair, PROMPTS, limit=count, max_new_tokens=T, temperature=1.0, seed=5, batch_size=count
    )
    responses = next(source.batches()).responses
    logp = measure(pair, responses, 1.0).policy_logp
    return [
        {
            "prompt": responses.prompts[i],
            "completion_ids": responses.tokens[i][responses.mask[i]].tolist(),
            "logprobs": logp[i][responses.mask[i]].tolist(),
        }
        for i in range(count)
    ]


def without(rows: list[dict], *names: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


@pytest.fixture
def pair(policy, ref, colours) -> ModelPair:
    return ModelPair.of(policy, ref, colours)


def test_replaying_what_was_sampled_gives_the_same_numbers(pair, colours, tmp_path):
    source = SampledResponses(
        pair, PROMPTS, limit=64, max_new_tokens=T, temperature=1.0, seed=5, batch_size=64
    )
    run = KLEstimation(pair, source, Settings())
    run.step()
    rows = without(sampled_rows(pair.policy.model, colours, 64), "logprobs")
    again = replay(pair, write(tmp_path / "c.jsonl", rows))
    for name, e in run.report().estimators.items():
        if name not in ("cv_fitted", "mcv", "mcv_positions"):  # their folds follow the order
            assert again.estimators[name].nats_per_response == pytest.approx(e.nats_per_response)
            assert again.estimators[name].stderr == pytest.approx(e.stderr)
    assert again.ess == 64
    assert any("taken as sampled from the policy" in note for note in again.notes)


def test_prompts_are_those_with_a_response_where_a_replay_was_interrupted(pair, colours, tmp_path):
    rows = sampled_rows(pair.policy.model, colours, 8)
    path = write(tmp_path / "c.jsonl", sorted(rows, key=lambda row: row["prompt"]))
    run = KLEstimation(pair, ReplayedResponses(pair, path, batch_size=3), Settings())
    counts = []
    while not run.done:
        run.step()
        counts.append(run.report(interrupted=True).prompts)
    assert counts == [2, 3, 4]  # of two responses each


def test_log_probs_equal_to_the_policys_change_nothing(pair, colours, tmp_path):
    rows = sampled_rows(pair.policy.model, colours, 64)
    weighted = replay(pair, write(tmp_path / "a.jsonl", rows))
    plain = replay(pair, write(tmp_path / "b.jsonl", without(rows, "logprobs")))
    assert weighted.best.nats_per_response == pytest.approx(plain.best.nats_per_response)
    assert weighted.ess == pytest.approx(64)
    assert "ht" in plain.estimators
    assert "ht" not in weighted.estimators  # it needs the probability of having been drawn


@pytest.mark.parametrize("kind", ["token", "response"])
def test_weights_make_another_samplers_responses_stand_for_the_policys(
    pair, colours, nearby, enumerated_kl, tmp_path, kind
):
    """Within five standard errors of enumeration; without the weights it is another number."""
    sampler = nearby(7, 0.04)
    rows = sampled_rows(sampler, colours, 2048)
    if kind == "response":
        whole = [{**row, "logprob": sum(row["logprobs"])} for row in rows]
        given = without(whole, "logprobs")
    else:
        given = rows
    settings = {"estimand": "given_prompts"}
    truth = enumerated_kl(pair.policy.model, pair.ref.model, PROMPTS, T)
    report = replay(pair, write(tmp_path / "c.jsonl", given), **settings)
    for name, e in report.estimators.items():
        if e.unbiased:
            assert abs(e.nats_per_response - truth) < 5 * e.stderr, name
    assert 0.3 * 2048 < report.ess < 0.97 * 2048
    plain = replay(pair, write(tmp_path / "d.jsonl", without(rows, "logprobs")), **settings)
    k1 = plain.estimators["k1"]
    assert abs(k1.nats_per_response - truth) > 5 * k1.stderr


def test_prefix_weights_vary_less_than_the_weight_of_the_whole(pair, colours, nearby, tmp_path):
    rows = sampled_rows(nearby(7, 0.03), colours, 1024)
    whole = without([{**row, "logprob": sum(row["logprobs"])} for row in rows], "logprobs")
    by_token = replay(pair, write(tmp_path / "a.jsonl", rows))
    by_response = replay(pair, write(tmp_path / "b.jsonl", whole))
    assert by_token.best.stderr < by_response.best.stderr


def test_cut_weights_are_counted_and_lower_the_kl(pair, colours, nearby, tmp_path):
    path = write(tmp_path / "c.jsonl", sampled_rows(nearby(7, 0.03), colours, 1024))
    whole, cut = replay(pair, path), replay(pair, path, truncate_at=1.0)
    assert whole.truncated_weights == 0
    assert 0.1 < cut.truncated_weights < 0.9
    assert cut.best.nats_per_response < whole.best.nats_per_response
    assert any("importance weights were cut at 1" in note for note in cut.notes)
    assert whole.best.unbiased
    assert not any(e.unbiased for e in cut.estimators.values())
    write_page([cut], tmp_path / "cut.html")
    assert "left:0.00%" in (tmp_path / "cut.html").read_text()  # the axis is still theirs


def test_each_weight_is_cut_by_itself_not_the_product_of_cut_ones(pair, tmp_path):
    """W_2, W_3, W_4 = 10, 10/9, 10/9 with c = 2 are 2, 10/9, 10/9."""
    ratios = torch.tensor([10.0, 1 / 9, 1.0]).double()
    path = write(tmp_path / "c.jsonl", [{"prompt": "red", "completion_ids": [1, 2, 3]}])
    draws = next(ReplayedResponses(pair, path, batch_size=1).batches())
    measured = measure(pair, draws.responses, 1.0)
    draws = replace(draws, sampler_logp=measured.policy_logp - ratios.log())
    weights = Weights.of(draws, measured, truncate_at=2.0)
    torch.testing.assert_close(weights.own[0], torch.tensor([2.0, 10 / 9, 10 / 9]).double())
    torch.testing.assert_close(weights.prefix[0], torch.tensor([1.0, 2.0, 10 / 9]).double())
    assert weights.response.tolist() == pytest.approx([10 / 9])
    assert weights.cut == 1


def test_text_is_tokenized_and_a_finished_one_ends_in_the_end_of_text(pair, colours, tmp_path):
    texts = [
        {"prompt": "red", "completion": "blue green", "finish_reason": "stop"},
        {"prompt": "red", "completion": "blue green red", "finish_reason": "length"},
    ]
    ids = [
        {"prompt_ids": [0, 1], "completion_ids": [3, 2, 0]},
        {"prompt_ids": [0, 1], "completion_ids": [3, 2, 1]},
    ]
    a, b = (
        replay(pair, write(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate((texts, ids))
    )
    assert a.best == b.best
    assert a.truncated_fraction == b.truncated_fraction == 0.5
    assert a.prompts == 1
    assert any("1 of 2 completions do not end" in note for note in a.notes)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "holds no completions"),
        ("nonsense", "line 1: not JSON"),
        ("[1]", r"line 1: no JSON object but \[1\]; give one object a line"),
        ('{"prompt": "red", "completion": "a \\ud800"}', "completion holds half of a surrogate"),
        ('{"prompt": "red", "completion": "red", "logprob": -1, "logprobs": [-1]}', "one of them"),
        ('{"prompt": "red"}', "line 1: has prompt, but neither completion nor completion_ids"),
        ('{"prompt": 1, "completion": "red"}', "prompt is no text but 1"),
        ('{"prompt": "", "completion": "red"}', "prompt 0 is empty"),
        ('{"prompt": "red", "completion": ""}', "completion is empty"),
        ('{"prompt": "red", "completion_ids": [4]}', "token ids from 0 to 3"),
        ('{"prompt": "red", "completion": "red", "logprobs": [-1, -1]}', "2 numbers for 1 tokens"),
        ('{"prompt": "red", "completion": "red", "logprobs": [1.0]}', "at most 0"),
        ('{"prompt": "red", "completion": "red", "logprob": NaN}', "finite"),
        ('{"prompt": "red", "completion": "' + 70 * "red " + '"}', "the models take 64"),
        (
            '{"prompt": "red", "completion": "red"}\n'
            '{"prompt": "red", "completion": "red", "logprob": -1}',
            "mixes kinds of log-probs",
        ),
    ],
)
def test_a_file_that_cannot_be_replayed_is_refused_with_its_line(pair, tmp_path, line, complaint):
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=complaint):
        ReplayedResponses(pair, path, batch_size=8)


def test_a_file_may_begin_with_a_byte_order_mark_and_has_to_be_utf_8(pair, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "red", "completion": "blue"}\n', encoding="utf-8-sig")
    assert ReplayedResponses(pair, path, batch_size=8).limit == 1
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"c\.jsonl is not text in UTF-8"):
        ReplayedResponses(pair, path, batch_size=8)


def test_a_file_that_is_not_there_is_refused(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of completions"):
        ReplayedResponses(pair, tmp_path / "none.jsonl", batch_size=8)


def test_padding_between_pairs_of_different_length_changes_nothing(pair, tmp_path):
    rows = [
        {"prompt": "red blue green", "completion_ids": [1, 2, 3, 1]},
        {"prompt": "red", "completion_ids": [2, 0]},
    ]
    path = write(tmp_path / "c.jsonl", rows)
    together = next(ReplayedResponses(pair, path, batch_size=2).batches())
    joint = measure(pair, together.responses, 1.0)
    for i, single in enumerate(ReplayedResponses(pair, path, batch_size=1).batches()):
        alone = measure(pair, single.responses, 1.0)
        torch.testing.assert_close(
            joint.k["rb"][i][joint.mask[i]], alone.k["rb"][0], rtol=1e-4, atol=1e-6
        )


def test_a_position_that_few_responses_reach_has_the_interval_of_those_few(pair, tmp_path):
    """Of 40 responses three have a second token and one a third, of which no spread is known."""
    lengths = [3, 2, 2] + [1] * 37
    rows = [
        {"prompt_ids": [i % 4, i // 4 % 4, i // 16], "completion_ids": [1, 2, 3][:length]}
        for i, length in enumerate(lengths)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    profile = replay(pair, path).profile
    draws = next(ReplayedResponses(pair, path, batch_size=40).batches())
    kl = measure(pair, draws.responses, 1.0).k["rb"]
    for position, reach in ((0, 40), (1, 3)):
        values = kl[:reach, position]
        half = t.ppf(0.975, reach - 1) * float(values.std()) / reach**0.5
        assert profile.kl[position] == pytest.approx(float(values.mean()))
        assert profile.half_width[position] == pytest.approx(half)
    assert profile.half_width[2] == profile.sampled_half_width[2] == float("inf")
    wide = replace(profile, half_width=[1e6] * 3)
    assert _limits(wide) == _limits(profile), "what few say does not flatten the page's figure"
