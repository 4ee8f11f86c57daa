"""What distillation reads: whose responses, which tokens of them, and the rows it refuses."""

import pytest
import torch
from datasets import Dataset

from rlkl.rollout import given_responses, sample_responses


@pytest.fixture
def texts(pairs) -> Dataset:
    return Dataset.from_dict({"text": [f"{row['prompt']} {row['completion']}" for row in pairs]})


def test_plain_text_is_response_from_its_first_token_on(make_distiller, texts, tokenizer, steps):
    trainer = make_distiller(train_dataset=texts, response_length=20)
    trainer.train()
    responses = given_responses(tokenizer, None, texts["text"][:1], 20)
    assert responses.prompt_ids.tolist() == [[tokenizer.bos_token_id]]
    assert responses.tokens[0, -1] == tokenizer.eos_token_id
    words = tokenizer(texts["text"][0], add_special_tokens=False)["input_ids"]
    assert responses.tokens[0, :-1].tolist() == words
    assert steps(trainer)[0]["response/length"] > 5


def test_only_completions_count_and_padding_does_not(make_distiller, pairs):
    trainer = make_distiller(response_length=20)
    one, many = trainer.given(pairs[:1]), trainer.given(pairs[:6])
    assert one.mask.sum() == 3  # two words and the end of text
    assert many.mask[0].sum() == 3
    values = []
    for responses in (one, many.rows(torch.tensor([0, 2]))):
        hidden = trainer.hidden_states(responses)
        values.append(hidden[0][:3])
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_cut_completions_do_not_end_and_whole_ones_do(tokenizer, pairs):
    responses = given_responses(tokenizer, pairs["prompt"][:2], pairs["completion"][:2], 3)
    assert responses.ended.tolist() == [True, False]
    assert responses.mask.sum(1).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({"on_policy_fraction": 1.0}, "student"),
        ({"teacher_generated": True}, "teacher"),
        ({}, "given"),
    ],
)
def test_responses_come_from_whom_the_settings_say(
    settings, who, make_distiller, monkeypatch, steps
):
    trainer = make_distiller(**settings)
    sampled = []

    def spy(model, *args, **kwargs):
        sampled.append("student" if model is trainer.model else "teacher")
        return sample_responses(model, *args, **kwargs)

    monkeypatch.setattr("rlkl.trainers.distill.sample_responses", spy)
    trainer.train()
    assert sampled == ([] if who == "given" else [who] * 2)
    assert steps(trainer)[0]["data/on_policy"] == (who == "student")


def test_the_mixture_takes_the_students_samples_at_the_rate_asked_for(make_distiller):
    trainer = make_distiller(on_policy_fraction=0.5)
    drawn = []
    for step in range(400):
        trainer.state.global_step = step
        coin = torch.rand((), generator=trainer._generator())
        drawn.append(float(coin) < 0.5)
    # Binomial(400, ½): four standard errors are 0.1.
    assert abs(sum(drawn) / 400 - 0.5) < 0.1


def test_data_and_models_that_do_not_fit_are_refused(make_distiller, make_lm, pairs):
    with pytest.raises(ValueError, match="columns 'prompt' and 'completion', or 'text', is needed"):
        make_distiller(train_dataset=pairs.remove_columns("completion"))
    make_distiller(train_dataset=pairs.remove_columns("completion"), teacher_generated=True)
    with pytest.raises(ValueError, match="the teacher's head has 20 rows for 33 tokens"):
        make_distiller(teacher_model=make_lm(vocab_size=20))


@pytest.mark.parametrize(
    ("column", "bad", "message"),
    [
        ("prompt", " ", "train_dataset: prompt 1 is empty"),
        ("completion", "", "train_dataset: completion 1 is empty .1 of 2 are.: .* or sample all"),
        ("completion", " \n", "completion 1 is empty"),
        ("prompt", None, "train_dataset: prompt 1 is no text but None: leave such rows out"),
    ],
)
def test_rows_that_teach_nothing_are_named(column, bad, message, make_distiller):
    rows = {"prompt": ["a", "a"], "completion": ["b", "b"]}
    rows[column][1] = bad
    data = Dataset.from_dict(rows)
    with pytest.raises(ValueError, match=message):
        make_distiller(train_dataset=data)
    with pytest.raises(ValueError, match=message.replace("train_dataset", "eval_dataset")):
        make_distiller(eval_dataset=data)
    if column == "completion":  # which nobody reads here
        make_distiller(train_dataset=data, on_policy_fraction=1.0)


def test_chat_messages_are_named(make_distiller):
    messages = [[{"role": "user", "content": "hi"}]]
    data = Dataset.from_dict({"prompt": messages, "completion": messages})
    with pytest.raises(ValueError, match=r"chat messages become a text by .*apply_chat_template"):
        make_distiller(train_dataset=data)


def test_what_a_tokenizer_without_bos_or_eos_cannot_do_is_refused_at_once(
    make_distiller, tokenizer
):
    texts = Dataset.from_dict({"text": ["good film", "good"] * 3})
    tokenizer.bos_token = None
    make_distiller(train_dataset=texts)  # "good", then the end of text
    with pytest.raises(ValueError, match="the tokenizer has no bos token to begin a text with"):
        make_distiller(train_dataset=texts, on_policy_fraction=0.1)
    tokenizer.pad_token, tokenizer.eos_token = "good", None
    with pytest.raises(ValueError, match="rows 0 to 5: text 1 leaves no token to predict"):
        make_distiller(train_dataset=texts)


def test_a_prompt_that_leaves_no_room_for_its_response_is_refused(make_distiller):
    long = Dataset.from_dict({"prompt": ["film " * 60] * 6, "completion": ["good"] * 6})
    make_distiller(train_dataset=long, response_length=2).train()  # 1 + 60 + 2 tokens, 64 positions
    with pytest.raises(ValueError, match="come to 66 tokens, and the model has 64 positions"):
        make_distiller(train_dataset=long, on_policy_fraction=0.1)
    with pytest.raises(ValueError, match=r"eval_dataset, rows 0 to 5: .* come to 66 tokens"):
        make_distiller(eval_dataset=long, eval_on_policy=True)
    long = Dataset.from_dict({"prompt": ["film " * 70] * 6, "completion": ["good"] * 6})
    with pytest.raises(ValueError, match="set a smaller max_prompt_length or a shorter response"):
        make_distiller(train_dataset=long, response_length=2)
    make_distiller(train_dataset=long, response_length=2, max_prompt_length=60).train()


def test_columns_that_are_not_read_may_hold_anything(make_distiller, pairs):
    trainer = make_distiller(train_dataset=pairs.add_column("input_ids", [[1]] * len(pairs)))
    trainer.train()
    assert trainer.state.global_step == 2


def test_several_evaluation_sets_are_measured_each_under_its_name(make_distiller, pairs):
    sets = {"first": pairs.select([0]), "all": pairs}
    trainer = make_distiller(eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, data in sets.items():
        assert metrics[f"eval_{name}_loss"] == trainer.evaluate(data)["eval_loss"]
    with pytest.raises(ValueError, match=r"eval_dataset 'far': .* is empty"):
        make_distiller(eval_dataset={"far": Dataset.from_dict({"text": [" "]})})


def test_a_stream_of_rows_is_refused(make_distiller, pairs):
    with pytest.raises(ValueError, match="train_dataset is of type IterableDataset"):
        make_distiller(train_dataset=pairs.to_iterable_dataset())
