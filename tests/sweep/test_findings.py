"""The sentences that a sweep ends with: what is said, of how much, and what is not."""

from dataclasses import replace

import pytest

from rlkl.sweep.analysis import Comparison, efficiencies
from rlkl.sweep.export import analyse
from rlkl.sweep.findings import findings
from rlkl.sweep.frontier import Estimate


def test_it_says_what_the_sweep_found(make_result):
    said = " ".join(line["text"] for line in findings(analyse(make_result(), resamples=50)))
    assert "rb has +" in said
    assert "reward over k1" in said
    assert "Share of the reward-vs-KL front" in said
    assert "Over-optimisation: with rb" in said


@pytest.mark.parametrize(
    ("apart", "said"),
    [
        ([1, 1, 1, 0, 0, -1, 0], "from 1.00 to 3.00 nats do not: there k1 is ahead, by up to 1.00"),
        ([0, 0, -1, -1, -1, 0, 1], "from 3.00 to 5.00 nats do not: there rb is ahead"),
        ([1, 1, 0, -1, -1, 1, 0], "no difference is shown."),
    ],
    ids=str,
)
def test_a_row_of_kls_that_differ_is_said_though_the_mean_does_not(make_result, apart, said):
    analysis = analyse(make_result(), resamples=20)
    differences = [Estimate(float(d), (d - 0.5, d + 0.5)) for d in apart]
    comparison = Comparison(
        "k1", "rb", list(map(float, range(1, 8))), differences, Estimate(0.1, (-0.1, 0.3))
    )
    reward = replace(analysis.reward, comparisons=[comparison])
    first = findings(replace(analysis, reward=reward))[0]["text"]
    assert said in first
    assert first.endswith(".")
    assert ("KL by KL" in first) == ("ahead" in said) == first.endswith("now and then: a hint.")


def test_it_says_what_was_tested_and_up_to_where_the_optimum_is_known(make_result):
    result = make_result()
    agreeing = [replace(p, judge=p.reward) for p in result.points]
    said = " ".join(
        line["text"] for line in findings(analyse(replace(result, points=agreeing), resamples=20))
    )
    assert "none has more reward by a t-test" in said
    assert "Where the optimum is known, up to 3.40 nats, the best of" in said
    beyond = sum(p.kl > 3.4 for p in result.points)
    assert f"Of the {beyond} runs beyond only upper bounds are known" in said


def test_noise_at_almost_no_kl_is_not_the_best_share_of_the_optimum(make_result):
    """0.5 of reward by chance at 0.001 nats is 17 times the gain of 0.03 that is possible."""
    result = make_result()
    points = [replace(p, reward_se=0.1) for p in result.points]
    points[0] = replace(points[0], kl=0.001, reward=0.5)
    result = replace(result, points=points)
    shares = [e.share for e in efficiencies(result)]
    assert shares[0] > 15 * max(shares[1:])
    said = " ".join(line["text"] for line in findings(analyse(result, resamples=2)))
    assert "runs (1 too uncertain to tell) reaches" in said
    assert "0.00 nats)" not in said


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([(0.2, 0.6), (0.4, 0.8)], "k1 40% [20%, 60%], rb 60% [40%, 80%]."),
        ([(0.0, 1.0), (0.0, 1.0)], "k1 40%, rb 60%; the seeds leave it open"),
        ([(0.0, 1.0), (0.1, 1.0)], "k1 40%, rb 60% [10%, 100%]; of k1 the seeds leave it open"),
        ([None, None], "k1 40%, rb 60%."),
    ],
)
def test_an_interval_that_holds_every_share_is_said_in_words(make_result, shares, said):
    analysis = analyse(make_result(configurations=4), resamples=2)
    estimates = {
        arm: Estimate(value, ci95)
        for arm, value, ci95 in zip(("k1", "rb"), (0.4, 0.6), shares, strict=True)
    }
    reward = replace(analysis.reward, share_on_front=estimates)
    lines = [line["text"] for line in findings(replace(analysis, reward=reward))]
    assert any(f"Share of the reward-vs-KL front: {said}" in line for line in lines), lines


def test_of_one_arm_no_share_is_said(make_result):
    result = make_result(configurations=4)
    alone = replace(result, points=[p for p in result.points if p.arm == "rb"])
    said = " ".join(line["text"] for line in findings(analyse(alone, resamples=2)))
    assert "Share" not in said


def test_a_judge_that_is_not_shown_to_fall_is_no_proof(make_result):
    """The reward rises with every configuration, the judge stays where it is, up to noise."""
    result = make_result()
    flat = [replace(p, judge=0.01 * (p.seed - 1) - 0.001 * p.configuration) for p in result.points]
    lines = [line["text"] for line in findings(analyse(replace(result, points=flat), resamples=2))]
    (first, _) = (line for line in lines if "ver-optimisation" in line)
    assert first.startswith("Over-optimisation perhaps: with k1")
    assert "That the judge falls is not shown" in first
    assert "less than it seems" not in first


def test_arms_without_a_common_kl_are_said_not_to_be_compared(make_result):
    result = make_result()
    points = [replace(p, kl=p.kl + 100 * (p.arm == "rb")) for p in result.points]
    said = " ".join(
        line["text"] for line in findings(analyse(replace(result, points=points), resamples=20))
    )
    assert "no range of KL in common: k1 and rb." in said
    assert "At equal KL" not in said


def test_it_says_at_which_length_the_responses_were_cut(make_result):
    result = make_result()

    def said(**changes) -> str:
        changed = replace(result, **changes)
        texts = [line["text"] for line in findings(analyse(changed, resamples=20))]
        return " ".join(text for text in texts if text.startswith("KL is that of"))

    assert said() == ""  # older records do not say
    of_spec = said(spec=result.spec | {"settings": {"response_length": 24}})
    assert of_spec.startswith("KL is that of responses cut at 24 tokens: that of whole responses")
    lengths = {"k1": 24, "rb": 48}
    points = [
        replace(
            p,
            measured={"response_length": lengths[p.arm]},
            extra={"truncated": 0.5 if p.arm == "k1" else 0.75},
        )
        for p in result.points
    ]
    assert "cut at 24 tokens (k1) or 48 tokens (rb), as 50% to 75% of a run's" in said(
        points=points
    )


def test_it_says_when_seeds_are_too_few_and_cells_failed(make_result):
    result = make_result(seeds=1)
    result.failed["004-seed0"] = "exit code 1"
    said = " ".join(line["text"] for line in findings(analyse(result)))
    assert "no interval over seeds" in said
    assert "1 cells failed" in said
