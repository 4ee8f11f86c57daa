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


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"has the columns \['label'\]; needed: prompt"):
        load_pairs(write(tmp_path / "a.jsonl", {"label": 1}))
