import numpy as np
import pytest

evaluate_sentiment = pytest.importorskip(
    "reward_models.evaluate_sentiment", reason="the baseline needs scikit-learn (extra `train`)"
)


def test_calibration_error_is_zero_for_honest_probabilities():
    p = np.repeat([0.9, 0.25], [100, 100])
    label = np.repeat([1, 0, 1, 0], [90, 10, 25, 75])
    assert evaluate_sentiment.calibration_error(p, label) == pytest.approx(0, abs=1e-12)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    certain_half_right = evaluate_sentiment.calibration_error(np.ones(10), np.repeat([0, 1], 5))
    assert certain_half_right == pytest.approx(0.5)
    timid_always_right = evaluate_sentiment.calibration_error(np.full(10, 0.6), np.ones(10))
    assert timid_always_right == pytest.approx(0.4)
    mixed = evaluate_sentiment.calibration_error(
        np.repeat([1.0, 0.6], 10), np.repeat([0, 1, 1], [5, 5, 10])
    )
    assert mixed == pytest.approx((0.5 + 0.4) / 2)
