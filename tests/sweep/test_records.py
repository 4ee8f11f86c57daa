"""What an evaluator wrote, before it becomes the record of a cell."""

import pytest

from rlkl.sweep.records import check_record

POINT = {"step": 4, "kl": 1.0, "kl_se": 0.1, "reward": 2.0, "reward_se": 0.1}


def test_a_measurement_is_taken():
    check_record({"points": [POINT, POINT | {"judge": 1.0, "judge_se": 0.1}]}, reference=False)
    check_record({"reference": {"reward": 0.0}}, reference=True)
    check_record({"reference": {"reward": 0.0}, "points": []}, reference=True)


@pytest.mark.parametrize(
    ("record", "reference", "said"),
    [
        ([], False, "wrote no points"),
        ({"points": []}, False, "wrote no points"),
        ({"points": POINT}, False, "wrote no points"),
        ({"points": [1.0]}, False, r"points\[0\] is no mapping"),
        ({"points": [POINT, {"step": 1}]}, False, r"points\[1\] has no number kl"),
        ({"points": [POINT | {"judge": 1.0}]}, False, "no number judge_se"),
        ({"points": [POINT | {"judge": "good"}]}, False, "no number judge"),
        ({"points": [POINT | {"kl": float("nan")}]}, False, "kl is nan"),
        ({"points": []}, True, "wrote no reference"),
        ({"reference": [1.0]}, True, "wrote no reference"),
        ({"reference": {"reward": float("inf")}}, True, "reward is inf"),
        ({"points": [POINT | {"kl": True}]}, False, "no number kl"),
        ({"points": [POINT | {"reward_se": -1.0}]}, False, r"\[0\].reward_se is -1.0; a standard"),
        ({"points": [POINT], "samples": "text"}, False, "samples is no list"),
        ({"points": [POINT], "samples": [{"prompt": "a"}]}, False, r"samples\[0\] has no number"),
        ({"points": [POINT], "versions": 3}, False, "versions is 3; a mapping"),
        ({"points": [POINT], "measured": [1]}, False, r"measured is \[1\]; a mapping"),
        ({"reference": {"reward": 0.0, "optimal": {}}}, True, "reference.optimal is no list"),
        ({"reference": {"reward": 0.0, "optimal": [{"kl": 1.0}]}}, True, r"optimal\[0\] has no"),
        ({"reference": {"reward": 0.0, "best_of_n": [3]}}, True, r"best_of_n\[0\] is no mapping"),
    ],
)
def test_what_is_no_measurement_is_refused_in_words(record, reference, said):
    with pytest.raises(ValueError, match=said):
        check_record(record, reference)
