"""Text metrics: their defining values, and what they refuse."""

import pytest

from rlkl.evaluation.text import distinct_n, rouge_l, self_bleu


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # Common subsequence "the sat mat": 3 of 4 words and 3 of 5 words.
    value = rouge_l(["the sat on mat"], ["the cat sat down mat"])
    precision, recall = 3 / 4, 3 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert value.mean.item() == pytest.approx(expected)
    assert rouge_l(["runs"], ["running"]).mean == 1  # stemmed


def test_rouge_l_takes_the_best_of_several_references_and_averages_responses():
    value = rouge_l(["a b", "c d"], [["x y", "a b"], "x y"])
    assert value.mean == 0.5
    assert value.stderr == pytest.approx(0.5)
    with pytest.raises(ValueError, match="2 responses and 1 references"):
        rouge_l(["a", "b"], ["a"])


def test_distinct_n_is_one_without_repetition_and_falls_with_it():
    assert distinct_n(["a b c", "d e"], 2) == 1
    assert distinct_n(["a a a a a"], 1) == 1 / 5
    with pytest.raises(ValueError, match="none of the 2 texts has 3 words"):
        distinct_n(["a b", ""], 3)


def test_self_bleu_is_higher_for_texts_that_are_alike():
    alike = ["the film was very good indeed", "the film was very good indeed too"]
    unlike = ["the film was very good indeed", "nobody would ever watch this again"]
    assert self_bleu(alike) > 50 > self_bleu(unlike)
    with pytest.raises(ValueError, match="there is 1"):
        self_bleu(["alone"])
