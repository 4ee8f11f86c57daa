"""Measures a review LM on held-out review openings beside a trigram model, and prints samples.

    python recipes/evaluate_review_lm.py --train_data stanfordnlp/imdb:train \
        stanfordnlp/imdb:unsupervised --eval_data stanfordnlp/imdb:test --output quality.json

The trigram model (interpolated, absolute discounting) counts the same training reviews in the same
tokens. Samples are the first that the seed gives, none left out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rlkl.data.reviews import load_reviews
from rlkl.evaluation.language_model import (
    TrigramLM,
    decoded_bytes,
    nats_of_openings,
    openings,
)
from rlkl.models import load_causal_lm, load_tokenizer
from rlkl.rollout import sample_responses


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_name_or_path", default=None, help="default: the embedded LM")
    parser.add_argument("--train_data", nargs="+", required=True, help="for the trigram model")
    parser.add_argument("--eval_data", required=True, help="held-out reviews")
    parser.add_argument("--reviews", type=int, default=5000, help="held-out reviews to measure")
    parser.add_argument("--length", type=int, default=48, help="tokens of an opening")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_causal_lm(args.model_name_or_path).eval()
    texts = load_reviews(args.eval_data, split="test")["text"]
    order = np.random.default_rng(args.seed).permutation(len(texts))[: args.reviews]
    held_out = [texts[i] for i in order]
    quality = {"lm": nats_of_openings(model, tokenizer, held_out, args.length)}

    train = list(dict.fromkeys(t for s in args.train_data for t in load_reviews(s)["text"]))
    end = tokenizer.eos_token_id
    ids = [
        np.array([end, *row], dtype=np.int64)
        for begin in range(0, len(train), 1000)
        for row in tokenizer(train[begin : begin + 1000], add_special_tokens=False)["input_ids"]
    ]
    trigram = TrigramLM(np.concatenate(ids), len(tokenizer))
    rows = openings(tokenizer, held_out, args.length)
    nats = -sum(float(trigram.logp(np.array([row])).sum()) for row in rows)
    tokens = sum(len(row) - 1 for row in rows)
    quality["trigram"] = {
        "nats_per_token": nats / tokens,
        "nats_per_byte": nats / decoded_bytes(tokenizer, rows),
        "tokens": tokens,
    }

    samples = sample_responses(
        model,
        tokenizer,
        [tokenizer.bos_token] * args.samples,
        60,
        generator=torch.Generator().manual_seed(args.seed),
    ).texts
    console = Console()
    table = Table(title=f"First {args.length} tokens of {len(rows)} held-out reviews")
    for column in ("", "nats per token", "nats per byte"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in quality.items():
        table.add_row(name, f"{row['nats_per_token']:.3f}", f"{row['nats_per_byte']:.3f}")
    console.print(table)
    for number, text in enumerate(samples, start=1):
        console.print(f"{number}. {text}", highlight=False, markup=False)
    if args.output:
        args.output.write_text(json.dumps(quality | {"samples": samples}, indent=2) + "\n")


if __name__ == "__main__":
    main()
