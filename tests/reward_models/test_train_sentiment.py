import argparse

import numpy as np
import pytest
import torch

train_sentiment = pytest.importorskip(
    "reward_models.train_sentiment", reason="training needs scikit-learn (extra `train`)"
)

TEXTS = [f"review number {i}" for i in range(2000)]


def test_halves_are_disjoint_of_equal_size_and_split_equal_texts_equally():
    halves = np.array([train_sentiment.half_of(text) for text in TEXTS])
    assert set(halves) == {0, 1}
    assert abs(halves.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(TEXTS))  # four standard errors
    assert train_sentiment.half_of(TEXTS[7]) == halves[7]


def test_calibration_reviews_are_one_in_twelve_of_either_half():
    kept = np.array([train_sentiment.is_kept_for_calibration(text) for text in TEXTS])
    halves = np.array([train_sentiment.half_of(text) for text in TEXTS])
    for half in (0, 1):
        share = kept[halves == half].mean()
        assert abs(share - 1 / 12) < 4 * np.sqrt(1 / 12 * 11 / 12 / (halves == half).sum())


def test_temperature_recovers_the_scale_of_overconfident_log_odds():
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, generator=generator)
    labels = (torch.rand(20_000, generator=generator) < torch.sigmoid(true)).long()
    assert train_sentiment.fit_temperature(true * 2.5, labels) == pytest.approx(2.5, rel=0.06)


def test_teacher_prefers_the_label_whose_words_it_saw():
    texts = ["a lovely film", "lovely and warm", "a dreary film", "dreary and cold"] * 5
    teacher = train_sentiment.Teacher(texts, np.array([1, 1, 0, 0] * 5))
    lovely, dreary = teacher.log_odds(["lovely", "dreary"])
    assert lovely > 0 > dreary


def test_windows_are_stretches_of_their_review_with_its_label():
    args = argparse.Namespace(
        short_batch=64,
        long_batch=8,
        short_tokens=(4, 8),
        long_tokens=16,
        opening_share=0.5,
        labelled_share=0.5,
        degenerate_share=0.0,
    )
    rows = [np.arange(100 * i, 100 * i + 40) for i in range(6)]
    target = np.array([0.0, 1.0, 0.2, 0.4, 0.6, 0.8])
    windows = train_sentiment.Windows(rows, target, 2, args)
    rng = np.random.default_rng(0)
    short, short_target = windows.short(rng)
    long, long_target = windows.long(rng)
    openings = sum(row[0] % 100 == 0 for row in short)
    assert 20 <= openings <= 44  # half of 64, four standard errors of 4
    targets = np.concatenate([short_target, long_target])
    for row, probability in zip(short + long, targets, strict=True):
        assert (np.diff(row) == 1).all()
        assert probability == target[row[0] // 100]
    assert {len(row) for row in long} == {16}


def test_degenerate_texts_repeat_a_phrase_and_are_neutral():
    args = argparse.Namespace(
        short_batch=32,
        short_tokens=(12, 12),
        opening_share=1.0,
        labelled_share=1.0,
        degenerate_share=1.0,
    )
    windows = train_sentiment.Windows([np.arange(30)] * 2, np.array([0.0, 1.0]), 2, args)
    rows, target = windows.short(np.random.default_rng(0))
    assert (target == 0.5).all()
    assert all(len(set(row.tolist())) <= 4 and len(row) == 12 for row in rows)
