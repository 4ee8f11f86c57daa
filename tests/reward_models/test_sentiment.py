import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from reward_models import (
    EMBEDDED_JUDGE,
    EMBEDDED_REWARD,
    LexiconReward,
    RewardModel,
    SentimentReward,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "a", "good", "bad", "film", "it", "was"]
PROMPTS = ["it was", "a film", "it", "a film it was a film"]
RESPONSES = [" a good film", " bad", " was bad bad good bad film it was", ""]


def save_classifier(folder: Path, id2label: dict[int, str], **config) -> Path:
    """A random one-layer classifier over nine words, saved with its own tokenizer."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=len(WORDS),
            dim=16,
            hidden_dim=16,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=32,
            initializer_range=1.0,
            num_labels=len(id2label),
            id2label=id2label,
            label2id={label: i for i, label in id2label.items()},
            **config,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reversed_labels(tmp_path_factory) -> Path:
    """Positive comes first, in capitals: position must not decide."""
    return save_classifier(tmp_path_factory.mktemp("reversed"), {0: "POSITIVE", 1: "NEGATIVE"})


@pytest.fixture(scope="module")
def nameless_labels(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("nameless"), {0: "LABEL_0", 1: "LABEL_1"})


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory) -> Path:
    names = {0: "negative", 1: "neutral", 2: "positive"}
    return save_classifier(tmp_path_factory.mktemp("three"), names)


def logits_one_by_one(reward: SentimentReward, texts: list[str]) -> torch.Tensor:
    """The classifier called by hand, one unpadded text at a time. [B, labels]"""
    rows = [reward.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    return torch.cat([reward.model(input_ids=row).logits for row in rows]).float()


def test_scores_are_one_float32_number_per_pair_without_gradient(reversed_labels):
    models: list[RewardModel] = [SentimentReward(reversed_labels), LexiconReward()]
    for model in models:
        scores = model(PROMPTS, RESPONSES)
        assert scores.shape == (len(PROMPTS),)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad


def test_score_is_log_odds_of_prompt_joined_with_response(three_labels):
    reward = SentimentReward(three_labels)
    texts = ["it was a good film", "a film bad", "it was bad bad good bad film it was", PROMPTS[3]]
    p = logits_one_by_one(reward, texts).double().softmax(dim=1)[:, 2]
    torch.testing.assert_close(
        reward(PROMPTS, RESPONSES), torch.log(p / (1 - p)).float(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(reward.probability_positive(texts), p.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_token_id", [None, 0, 7], ids=["no pad id", "its pad id", "another"])
def test_a_causal_classifier_scores_a_text_the_same_in_any_company(tmp_path, side, pad_token_id):
    """Its positions count padding on the left, and it reads its score where padding begins."""
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    save_classifier(tmp_path, labels)  # for its tokenizer
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.5,
        pad_token_id=pad_token_id,
        id2label=labels,
        label2id={label: i for i, label in labels.items()},
    )
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    reward = SentimentReward(tmp_path)
    reward.tokenizer.padding_side = side
    logits = logits_one_by_one(reward, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(reward(PROMPTS, RESPONSES), logits[:, 1] - logits[:, 0])


def test_raw_logit_is_the_logit_of_the_positive_label(reversed_labels):
    reward = SentimentReward(reversed_labels, score="logit")
    texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    expected = logits_one_by_one(reward, texts)[:, 0]
    torch.testing.assert_close(reward(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=0)


def test_positive_label_is_found_by_name_not_by_position(reversed_labels):
    by_name = SentimentReward(reversed_labels)(PROMPTS, RESPONSES)
    named = SentimentReward(reversed_labels, positive_label="Negative")(PROMPTS, RESPONSES)
    torch.testing.assert_close(by_name, -named)
    assert by_name.abs().max() > 0.1


def test_classifier_without_a_positive_label_is_refused_with_the_remedy(nameless_labels):
    with pytest.raises(ValueError, match=r"LABEL_0.*LABEL_1.*positive_label") as error:
        SentimentReward(nameless_labels)
    assert "\n" not in str(error.value)
    assert SentimentReward(nameless_labels, positive_label="label_1").positive_id == 1
    with pytest.raises(ValueError, match=r"good.*LABEL_0"):
        SentimentReward(nameless_labels, positive_label="good")


def test_folder_without_weights_is_refused_in_one_line(reversed_labels, tmp_path):
    for file in reversed_labels.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="no model weights") as error:
        SentimentReward(tmp_path)
    assert "\n" not in str(error.value)


def test_language_model_without_classification_head_is_refused(reversed_labels, tmp_path):
    config = GPT2Config(vocab_size=9, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((reversed_labels / name).read_bytes())
    with pytest.raises(ValueError, match=r"score\.weight"):
        SentimentReward(tmp_path)


def test_log_odds_of_a_single_output_are_refused_and_its_raw_output_is_given(tmp_path):
    save_classifier(tmp_path, {0: "LABEL_0"})
    with pytest.raises(ValueError, match="score='logit'"):
        SentimentReward(tmp_path)
    reward = SentimentReward(tmp_path, score="logit")
    texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    expected = logits_one_by_one(reward, texts)[:, 0]
    torch.testing.assert_close(reward(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=0)


def test_log_odds_of_a_multi_label_classifier_are_refused(tmp_path):
    save_classifier(tmp_path, {0: "neg", 1: "pos"}, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="multi-label"):
        SentimentReward(tmp_path)


def test_a_classifier_that_reads_the_padding_is_refused_in_words(tmp_path):
    """XLNet's reads its score at the last place, and says that it has -1 positions."""
    tokenizer = AutoTokenizer.from_pretrained(save_classifier(tmp_path, {0: "negative"}))
    labels = {"id2label": {0: "negative", 1: "positive"}, "initializer_range": 0.5}
    shape = {"vocab_size": len(WORDS), "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    XLNetForSequenceClassification(XLNetConfig(**shape, **labels)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives a text another score beside a longer one"):
        SentimentReward(tmp_path)


def test_clamp_limits_the_score_and_nothing_else(reversed_labels):
    free = SentimentReward(reversed_labels)(PROMPTS, RESPONSES)
    limit = free.abs().median().item()
    clamped = SentimentReward(reversed_labels, clamp=limit)(PROMPTS, RESPONSES)
    torch.testing.assert_close(clamped, free.clamp(-limit, limit))
    assert (clamped != free).any()


def test_bad_arguments_are_named(reversed_labels):
    with pytest.raises(ValueError, match="'prob'"):
        SentimentReward(reversed_labels, score="prob")  # pyright: ignore[reportArgumentType]
    for clamp in (-1.0, math.nan):
        with pytest.raises(ValueError, match="clamp"):
            SentimentReward(reversed_labels, clamp=clamp)
    for length in (0, -5):
        with pytest.raises(ValueError, match=f"max_length is {length}; give at least 1"):
            SentimentReward(reversed_labels, max_length=length)
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        SentimentReward(reversed_labels)(["a", "b"], ["c"])


def test_one_text_is_not_read_letter_by_letter(reversed_labels):
    reward = SentimentReward(reversed_labels)
    for prompts, responses in (("a", "b"), (["a"], "b"), ("a", ["b"])):
        with pytest.raises(ValueError, match="is one text: give a list"):
            reward(prompts, responses)
    with pytest.raises(ValueError, match="texts is one text: give a list"):
        reward.probability_positive("good")


def test_text_beyond_max_length_is_not_read(reversed_labels):
    reward = SentimentReward(reversed_labels, max_length=3)
    scores = reward(["a good"] * 2, [" film", " bad bad bad"])
    torch.testing.assert_close(scores[0], scores[1])


@pytest.fixture(scope="module", params=[EMBEDDED_REWARD, EMBEDDED_JUDGE], ids=["reward", "judge"])
def embedded(request) -> SentimentReward:
    return SentimentReward(request.param)


class TestEmbeddedClassifiers:
    def test_ranks_obvious_sentences(self, embedded):
        good = ["A wonderful, moving film. I loved every minute.", "One of the best movies ever."]
        bad = ["A dreadful, boring film. I hated every minute.", "One of the worst movies ever."]
        assert (embedded.probability_positive(good) > 0.75).all()
        assert (embedded.probability_positive(bad) < 0.25).all()

    def test_score_does_not_depend_on_batch_neighbours_or_padding(self, embedded, monkeypatch):
        texts = [
            "Great.",
            "The plot was thin, but the actors made it worth the evening, and I would go again.",
            "",
            "Dull from the first scene to the last. " * 12,
        ]
        alone = torch.cat([embedded([""], [text]) for text in texts])
        together = embedded([""] * 4, texts)
        monkeypatch.setattr(embedded, "batch_size", 3)
        backwards = embedded([""] * 4, texts[::-1]).flip(0)
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(backwards, alone, atol=1e-4, rtol=0)

    def test_labels_are_named_and_weights_are_float32_in_use(self, embedded):
        assert embedded.model.config.id2label == {0: "negative", 1: "positive"}
        assert not embedded.model.training
        assert all(p.dtype == torch.float32 for p in embedded.model.parameters())


def test_reward_and_judge_are_different_models():
    reward, judge = SentimentReward(EMBEDDED_REWARD), SentimentReward(EMBEDDED_JUDGE)
    assert type(reward.model) is not type(judge.model)
    assert reward.tokenizer.get_vocab() != judge.tokenizer.get_vocab()


def test_lexicon_reward_counts_words_across_prompt_and_response():
    scores = LexiconReward()(["A great", "dread"], ["ly dull, bad film", "ful but good good good"])
    assert scores.tolist() == [-2.0, 2.0]
