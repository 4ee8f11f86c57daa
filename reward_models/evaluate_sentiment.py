"""Measures the reward and the judge on held-out reviews, beside a word-count baseline.

    python -m reward_models.evaluate_sentiment --train_data stanfordnlp/imdb:train \
        --test_data stanfordnlp/imdb:test --policy_tokenizer runs/review_lm --output quality.json

Each classifier reads every test review whole (up to its 512 tokens) and its first 48 tokens alone,
by the policy's tokenizer and by its own; CPU seconds are those of scoring 64 and 512 openings in
one call. The baseline is logistic regression on word counts, fitted to the whole labelled half that
the classifier learned from. Expected calibration error (ECE):
Σ_b n_b/n · |accuracy_b − confidence_b| over 15 equal bins of confidence max(p, 1 − p)
between 0.5 and 1 (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward_models import EMBEDDED_JUDGE, EMBEDDED_REWARD, SentimentReward
from reward_models.train_sentiment import labelled_half
from rlkl.data.reviews import load_reviews


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train_data", required=True, help="labelled: for the baseline")
    parser.add_argument("--test_data", required=True, help="labelled and held out")
    parser.add_argument("--reward", default=str(EMBEDDED_REWARD))
    parser.add_argument("--judge", default=str(EMBEDDED_JUDGE))
    parser.add_argument("--reward_half", type=int, choices=(0, 1), default=0)
    parser.add_argument("--policy_tokenizer", required=True, help="its tokens count the first 48")
    parser.add_argument("--tokens", type=int, default=48, help="length of an opening")
    parser.add_argument("--sample", type=int, help="only so many test reviews, drawn with seed 0")
    parser.add_argument("--output", type=Path, help="also write the table as JSON")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def calibration_error(p: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of p(positive), in [0, 0.5]."""
    confidence, right = np.maximum(p, 1 - p), (p > 0.5) == (label == 1)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs((right[place == b] - confidence[place == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(p))


def openings(texts: list[str], tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first `count` tokens of each text, as text."""
    rows = tokenizer(texts, truncation=True, max_length=count, add_special_tokens=False)
    return [str(tokenizer.decode(row)) for row in rows["input_ids"]]


def figures(p: np.ndarray, label: np.ndarray) -> dict[str, float]:
    accuracy = float(((p > 0.5) == (label == 1)).mean())
    return {
        "accuracy": round(accuracy, 4),
        "accuracy_se": round((accuracy * (1 - accuracy) / len(p)) ** 0.5, 4),
        "ece": round(calibration_error(p, label), 4),
    }


def cpu_seconds(classifier: SentimentReward, texts: list[str], repeats: int = 5) -> float:
    """Median CPU time of scoring `texts`, tokenization included."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        classifier([""] * len(texts), texts)
        times.append(time.process_time() - begun)
    return round(float(np.median(times)), 4)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    test = load_reviews(args.test_data, "test")
    if args.sample is not None:
        test = test.shuffle(seed=0).select(range(args.sample))
    texts, label = list(test["text"]), np.array(test["label"])
    policy = AutoTokenizer.from_pretrained(args.policy_tokenizer)
    views = {"whole": texts, "first_48": openings(texts, policy, args.tokens)}

    table: dict[str, dict[str, Any]] = {}
    sure: dict[str, dict[str, np.ndarray]] = {}
    halves = {"reward": args.reward_half, "judge": 1 - args.reward_half}
    for role, half in halves.items():
        folder = args.reward if role == "reward" else args.judge
        classifier = SentimentReward(folder)
        own = openings(texts, classifier.tokenizer, args.tokens)
        sure[role] = {
            view: classifier.probability_positive(seen).numpy()
            for view, seen in (views | {"first_48_own_tokens": own}).items()
        }
        table[role] = {view: figures(p, label) for view, p in sure[role].items()}
        for count in (64, 512):
            table[role][f"cpu_seconds_{count}_openings"] = cpu_seconds(
                classifier, views["first_48"][:count]
            )
        table[role]["architecture"] = type(classifier.model).__name__
        table[role]["parameters"] = classifier.model.num_parameters()

        print(role, json.dumps(table[role]), flush=True)

        train_texts, train_label = labelled_half(args.train_data, half)
        counter = CountVectorizer(min_df=2)
        baseline = LogisticRegression(max_iter=1000)
        baseline.fit(counter.fit_transform(train_texts), train_label)
        table[f"baseline_{role}_half"] = {
            view: figures(baseline.predict_proba(counter.transform(seen))[:, 1], label)
            for view, seen in views.items()
        }
    table["agreement"] = {
        view: round(float(((sure["reward"][view] > 0.5) == (sure["judge"][view] > 0.5)).mean()), 4)
        for view in views
    }
    print("| | accuracy, whole | ECE, whole | accuracy, first 48 | ECE, first 48 |")
    print("|---|---|---|---|---|")
    for name, row in table.items():
        if name != "agreement":
            cells = [f"{100 * row[v]['accuracy']:.1f}% | {row[v]['ece']:.3f}" for v in views]
            print(f"| {name} | {' | '.join(cells)} |")
    print(json.dumps(table, indent=2))
    if args.output:
        args.output.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
