"""Trains a small sentiment classifier, for transformers, on one half of the labelled reviews.

    python -m reward_models.train_sentiment --architecture modernbert --half 0 \
        --train_data stanfordnlp/imdb:train --unlabelled_data stanfordnlp/imdb:unsupervised \
        --exclude_data stanfordnlp/imdb:test --output_dir runs/sentiment_reward

Local files work the same (``--train_data train.jsonl.xz``), with columns ``text`` and ``label``,
1 = positive.

1. A review belongs to half 0 or 1 by a hash of its text, labelled or not: the chains of two
   classifiers share no review. One labelled review in twelve of the half is kept for calibration.
2. A teacher, logistic regression on one- and two-word counts scaled by naive Bayes log-count ratios
   (Wang and Manning 2012, https://aclanthology.org/P12-2018), is fitted to the labelled reviews of
   the half and gives the unlabelled ones of the half a probability each.
3. A transformer with its own tokenizer learns both: each update reads openings, windows from
   anywhere, and long stretches, all with the label (or probability) of their whole review. A
   window's label is thus noisy, and the right answer to a window is a probability, which is what
   the classifier learns to say.
4. A few degenerate texts, some tokens over and over, are taught the probability one half. (In
   the embedded pair this had no visible effect: see README.md.)
5. The logits are divided by the temperature that fits the kept reviews best, in the last layer.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, diags
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlkl.data.reviews import load_reviews

PAD, UNKNOWN, CLS = "[PAD]", "[UNK]", "[CLS]"
LABELS = {0: "negative", 1: "positive"}
POSITIONS = 512


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train_data", required=True, help="labelled: file or hub id (id:split)")
    parser.add_argument("--unlabelled_data", help="more reviews, for the teacher to label")
    parser.add_argument("--exclude_data", help="reviews never to train on: the test set")
    parser.add_argument("--half", type=int, choices=(0, 1), required=True)
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--short_batch", type=int, default=192, help="short texts per update")
    parser.add_argument("--long_batch", type=int, default=24, help="long texts per update")
    parser.add_argument(
        "--short_tokens", type=int, nargs=2, default=(16, 80), help="shortest, longest"
    )
    parser.add_argument("--long_tokens", type=int, default=256)
    parser.add_argument("--opening_share", type=float, default=0.6, help="of the short texts")
    parser.add_argument("--labelled_share", type=float, default=0.5, help="of all texts")
    parser.add_argument("--degenerate_share", type=float, default=0.04, help="of the short texts")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def half_of(text: str) -> int:
    """0 or 1, the same for equal texts whatever the file or order they come in."""
    return text_hash(text) % 2


def is_kept_for_calibration(text: str) -> bool:
    """One text in twelve, independently of its half."""
    return text_hash(text) // 2 % 12 == 0


def labelled_half(source: str, half: int) -> tuple[list[str], np.ndarray]:
    """Texts and labels (1 = positive) of one half of a labelled source."""
    data = load_reviews(source)
    rows = dict(zip(data["text"], data["label"], strict=True))
    rows = {text: label for text, label in rows.items() if half_of(text) == half}
    return list(rows), np.array(list(rows.values()))


class Teacher:
    """Logistic regression on binary one- and two-word counts times their log-count ratio."""

    def __init__(self, texts: list[str], labels: np.ndarray) -> None:
        self.counter = CountVectorizer(
            ngram_range=(1, 2), min_df=2, binary=True, token_pattern=r"\w+|[!?]"
        )
        counts = csr_matrix(self.counter.fit_transform(texts))
        positive = np.asarray(counts[labels == 1].sum(axis=0)).ravel() + 1
        negative = np.asarray(counts[labels == 0].sum(axis=0)).ravel() + 1
        self.ratio = np.log(positive / positive.sum()) - np.log(negative / negative.sum())
        self.model = LogisticRegression(C=0.1, solver="liblinear")
        self.model.fit(counts @ diags(self.ratio), labels)
        self.temperature = 1.0

    def calibrate(self, texts: list[str], labels: np.ndarray) -> None:
        logits = torch.from_numpy(self.log_odds(texts))
        self.temperature = fit_temperature(logits, torch.from_numpy(labels))

    def log_odds(self, texts: list[str]) -> np.ndarray:
        counts = csr_matrix(self.counter.transform(texts))
        return self.model.decision_function(counts @ diags(self.ratio)) / self.temperature


def fit_temperature(log_odds: Tensor, labels: Tensor) -> float:
    """The T > 0 for which σ(log-odds / T) has the smallest cross-entropy, by a grid in log T."""
    grid = torch.linspace(np.log(0.3), np.log(4.0), 400).exp()
    losses = [F.binary_cross_entropy_with_logits(log_odds / t, labels.to(log_odds)) for t in grid]
    return float(grid[torch.stack(losses).argmin()])


def train_tokenizer(texts: list[str], kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Lower-case WordPiece, or cased byte-level BPE; every text opens with [CLS]."""
    special = [PAD, UNKNOWN, CLS]
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special)
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A", special_tokens=[(CLS, core.token_to_id(CLS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=CLS,
        model_max_length=POSITIONS,
    )


def modernbert(args: argparse.Namespace) -> PreTrainedConfig:
    """Rotary positions, gated MLPs, mean of the last hidden states."""
    return ModernBertConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        intermediate_size=args.width * 3 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=POSITIONS,
        layer_types=["full_attention"] * args.layers,
        classifier_pooling="mean",
        embedding_dropout=args.dropout,
        mlp_dropout=args.dropout,
        classifier_dropout=args.dropout,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )


def distilbert(args: argparse.Namespace) -> PreTrainedConfig:
    """Learned positions, layer norm after each block, the first token's last hidden state."""
    return DistilBertConfig(
        vocab_size=args.vocab_size,
        dim=args.width,
        hidden_dim=args.width * 2,
        n_layers=args.layers,
        n_heads=args.heads,
        max_position_embeddings=POSITIONS,
        dropout=args.dropout,
        attention_dropout=0.0,
        seq_classif_dropout=args.dropout,
        bos_token_id=None,
        eos_token_id=None,
    )


ARCHITECTURES = {"modernbert": (modernbert, "wordpiece"), "distilbert": (distilbert, "bpe")}


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = ARCHITECTURES[args.architecture][0](args)
    config.id2label = dict(LABELS)
    config.label2id = {label: i for i, label in LABELS.items()}
    config.problem_type = "single_label_classification"
    config.pad_token_id = tokenizer.pad_token_id
    config.cls_token_id = tokenizer.cls_token_id
    # eager attention: twice as fast as sdpa's CPU backward at this size
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")


class Windows:
    """Draws stretches of tokenized reviews, each with the probability of its whole review."""

    def __init__(
        self, rows: list[np.ndarray], target: np.ndarray, labelled: int, args: argparse.Namespace
    ) -> None:
        self.rows, self.target, self.labelled, self.args = rows, target, labelled, args

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of `count` reviews, the stated share of them labelled."""
        unlabelled = len(self.rows) - self.labelled
        if unlabelled == 0:
            return rng.integers(0, self.labelled, count)
        gold = rng.random(count) < self.args.labelled_share
        return np.where(
            gold,
            rng.integers(0, self.labelled, count),
            self.labelled + rng.integers(0, unlabelled, count),
        )

    def short(self, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
        low, high = self.args.short_tokens
        index = self.draw(self.args.short_batch, rng)
        target, rows = self.target[index], []
        for place, i in enumerate(index):
            row, length = self.rows[i], int(rng.integers(low, high + 1))
            opening = rng.random() < self.args.opening_share
            start = 0 if opening else int(rng.integers(0, max(1, len(row) - length // 2)))
            row = row[start : start + length]
            if rng.random() < self.args.degenerate_share:
                first = int(rng.integers(0, len(row)))
                phrase = row[first : first + int(rng.integers(1, 5))]
                row, target[place] = np.resize(phrase, length), 0.5
            rows.append(row)
        return rows, target

    def long(self, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
        index, length, rows = self.draw(self.args.long_batch, rng), self.args.long_tokens, []
        for i in index:
            last = max(0, len(self.rows[i]) - length)
            start = int(rng.integers(0, last + 1))
            rows.append(self.rows[i][start : start + length])
        return rows, self.target[index]


def collate(rows: list[np.ndarray], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """[CLS] and the row, padded to the longest."""
    width = 1 + max(len(row) for row in rows)
    ids = torch.full((len(rows), width), cast(int, tokenizer.pad_token_id))
    for i, row in enumerate(rows):
        ids[i, 0] = cast(int, tokenizer.cls_token_id)
        ids[i, 1 : 1 + len(row)] = torch.from_numpy(row.astype(np.int64))
    lengths = torch.tensor([1 + len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
    }


def loss_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[np.ndarray],
    target: np.ndarray,
) -> Tensor:
    """Cross-entropy with a probability as target."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**collate(rows, tokenizer)).logits
    positive = torch.from_numpy(target).float()
    return F.cross_entropy(logits.float(), torch.stack([1 - positive, positive], dim=1))


@torch.no_grad()
def log_odds(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[np.ndarray]
) -> Tensor:
    model.eval()
    result = torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for begin in range(0, len(order), 64):
        index = order[begin : begin + 64]
        logits = model(**collate([rows[i] for i in index], tokenizer)).logits
        result[index] = logits[:, 1] - logits[:, 0]
    model.train()
    return result


def quality(log_odds: Tensor, labels: Tensor) -> dict[str, float]:
    loss = F.binary_cross_entropy_with_logits(log_odds, labels.to(log_odds))
    right = (log_odds > 0) == (labels == 1)
    return {"accuracy": round(right.double().mean().item(), 4), "nats": round(loss.item(), 4)}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    begun = time.perf_counter()

    excluded = set(load_reviews(args.exclude_data, "test")["text"]) if args.exclude_data else set()
    texts, labels = labelled_half(args.train_data, args.half)
    allowed = np.array([text not in excluded for text in texts])
    kept = allowed & np.array([is_kept_for_calibration(text) for text in texts])
    train = allowed & ~kept
    kept_texts, kept_labels = [texts[i] for i in kept.nonzero()[0]], labels[kept]
    train_texts, target = [texts[i] for i in train.nonzero()[0]], labels[train].astype(float)
    labelled = len(train_texts)
    log: dict[str, object] = {"labelled": labelled, "kept": len(kept_texts)}

    if args.unlabelled_data:
        teacher = Teacher(train_texts, labels[train])
        teacher.calibrate(kept_texts, kept_labels)
        known = set(texts) | excluded
        more = dict.fromkeys(load_reviews(args.unlabelled_data)["text"])
        more = [text for text in more if half_of(text) == args.half and text not in known]
        target = np.concatenate([target, 1 / (1 + np.exp(-teacher.log_odds(more)))])
        train_texts += more
        log["unlabelled"] = len(more)
        log["teacher"] = quality(
            torch.from_numpy(teacher.log_odds(kept_texts)), torch.from_numpy(kept_labels)
        )
    print(json.dumps(log), flush=True)

    kind = ARCHITECTURES[args.architecture][1]
    tokenizer = train_tokenizer(train_texts, kind, args.vocab_size)

    def tokenize(texts: list[str]) -> list[np.ndarray]:
        rows = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(row.ids, dtype=np.uint16) for row in rows]

    windows = Windows(tokenize(train_texts), target, labelled, args)
    kept_rows = [row[: POSITIONS - 1] for row in tokenize(kept_texts)]
    kept_openings = [row[:48] for row in kept_rows]
    kept_label = torch.from_numpy(kept_labels)
    model = make_model(args, tokenizer).train()
    print(f"{model.num_parameters():,} parameters, {time.perf_counter() - begun:.0f} s", flush=True)

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        weight_decay=args.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / args.warmup_steps, 1) * (1 - step / args.steps),
    )
    rng = np.random.default_rng(args.seed)
    for step in tqdm(range(args.steps), mininterval=10.0):
        loss_short = loss_on(model, tokenizer, *windows.short(rng))
        loss_short.backward()
        loss_long = loss_on(model, tokenizer, *windows.long(rng))
        loss_long.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            record = {
                "step": step + 1,
                "seconds": round(time.perf_counter() - begun),
                "loss_short": round(loss_short.item(), 4),
                "loss_long": round(loss_long.item(), 4),
                "kept_whole": quality(log_odds(model, tokenizer, kept_rows), kept_label),
                "kept_48": quality(log_odds(model, tokenizer, kept_openings), kept_label),
            }
            print(json.dumps(record), flush=True)

    both = torch.cat([log_odds(model, tokenizer, rows) for rows in (kept_rows, kept_openings)])
    temperature = fit_temperature(both, kept_label.repeat(2))
    with torch.no_grad():
        for parameter in model.get_submodule("classifier").parameters():
            parameter.div_(temperature)
    print(json.dumps({"temperature": round(temperature, 4)}))
    save(model, tokenizer, args.output_dir)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """float16 weights and a tokenizer file without indentation: half the size in the repository."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    short = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    file.write_text(short, encoding="utf-8")


if __name__ == "__main__":
    main()
