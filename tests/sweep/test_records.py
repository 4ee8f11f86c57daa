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
    ],
)
def test_what_is_no_measurement_is_refused_in_words(record, reference, said):
    with pytest.raises(ValueError, match=said):
        check_record(record, reference)
