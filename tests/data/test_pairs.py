"""Instruction data in the formats that people have: each becomes prompt and completion."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlkl.data import INSTRUCTION_TEMPLATE, load_pairs


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("answer", ["completion", "response", "output"])
def test_prompts_with_an_answer_of_any_of_its_names(answer, tmp_path):
    data = load_pairs(write(tmp_path / "a.jsonl", {"prompt": "Q", answer: "A"}))
    assert data.to_list() == [{"prompt": "Q", "completion": "A"}]


def test_instructions_go_through_the_template_with_their_input_if_there_is_one(tmp_path):
    rows = (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Speak.", "input": "", "output": "Yes."},
    )
    data = load_pairs(write(tmp_path / "a.jsonl", *rows))
    assert data[0]["completion"] == "3"
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n" in data[0]["prompt"]
    assert data[1]["prompt"] == INSTRUCTION_TEMPLATE.format(instruction="Speak.", input="")
    assert "### Input" not in data[1]["prompt"]


def test_self_instruct_rows_take_their_first_instance(tmp_path):
    instances = [{"input": "", "output": "A"}, {"input": "x", "output": "B"}]
    data = load_pairs(write(tmp_path / "a.jsonl", {"instruction": "Do.", "instances": instances}))
    assert data[0]["completion"] == "A"


def test_vicuna_questions_take_their_reference_by_id_and_none_is_an_empty_completion(tmp_path):
    questions = write(
        tmp_path / "question.jsonl",
        {"question_id": 1, "turns": ["Why?"]},
        {"question_id": 2, "turns": ["How?"]},
    )
    references = write(
        tmp_path / "reference.jsonl", {"question_id": 2, "choices": [{"turns": ["So."]}]}
    )
    assert load_pairs(questions)["completion"] == ["", ""]
    data = load_pairs(questions, references)
    assert data["completion"] == ["", "So."]
    assert "Why?" in data[0]["prompt"]
    plain = write(tmp_path / "answer.jsonl", {"question_id": 1, "text": "Because."})
    assert load_pairs(questions, plain)["completion"] == ["Because.", ""]


def test_plain_texts_stay_texts(tmp_path):
    assert load_pairs(write(tmp_path / "a.jsonl", {"text": "T"})).to_list() == [{"text": "T"}]


def test_an_answer_that_is_a_number_counts_even_0_and_null_is_none(tmp_path):
    rows = [{"prompt": "How many?", "completion": n} for n in (0, 1, None)]
    assert load_pairs(write(tmp_path / "a.jsonl", *rows))["completion"] == ["0", "1", ""]


def test_the_context_of_an_instruction_is_its_input(tmp_path):
    row = {"instruction": "When?", "context": "It was 1931.", "response": "1931"}  # Dolly
    (pair,) = load_pairs(write(tmp_path / "a.jsonl", row))
    assert "### Input:\nIt was 1931.\n\n### Response:\n" in pair["prompt"]
    assert pair["completion"] == "1931"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"label": 1}', r"row 0: the columns are \['label'\]; needed: prompt and completion"),
        ("", "has no rows"),
        ('{"prompt": "a"}\nnot json\n', "cannot be read as json"),
        ('{"prompt": "a"}\n{"prompt": null}', "row 1: prompt is missing"),
        ('{"text": null}', "row 0: text is missing"),
        ('{"prompt": [{"role": "user", "content": "hi"}]}', "row 0: prompt is no text but .*chat"),
        ('{"prompt": "a", "completion": [{"role": "user"}]}', "row 0: the answer is no text but"),
        ('{"instruction": "a", "instances": []}', "row 0: instances is empty"),
        ('{"question_id": 1, "turns": []}', "row 0: turns is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_named(content, message, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pairs(tmp_path / "none.jsonl")
