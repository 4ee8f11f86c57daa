"""Instruction data in the formats that people have: each becomes prompt and completion."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "text": "So."}, r"question_id is missing.*columns are \['id', 'text'\]"),
        ({"question_id": None, "text": "So."}, "question_id is missing"),
        ({"question_id": 1, "answer": "So."}, "needs question_id, and choices or text: rename"),
        ({"question_id": 1, "choices": [{"text": "So."}]}, r"turns is missing.* \['text'\]"),
        ({"question_id": 1, "choices": ["So."]}, "choices holds no objects but 'So.'"),
        ({"question_id": 1, "choices": "So."}, "choices is no list but 'So.': a JSON file can"),
        ({"question_id": "2", "text": "No."}, "question_id 2 is answered for the second time"),
    ],
)
def test_references_that_cannot_be_joined_are_named(row, message, tmp_path):
    questions = write(tmp_path / "question.jsonl", {"question_id": 1, "turns": ["Why?"]})
    references = write(tmp_path / "reference.jsonl", {"question_id": 2, "text": "Fine."}, row)
    with pytest.raises(ValueError, match=rf"reference\.jsonl, row 1: .*{message}"):
        load_pairs(questions, references)


def test_prompts_and_instructions_take_a_reference_where_they_have_no_answer(tmp_path):
    rows = write(
        tmp_path / "rows.jsonl",
        {"prompt": "P", "question_id": 1},
        {"instruction": "Do.", "question_id": 1},
        {"instruction": "Do.", "instances": [{"input": "", "output": ""}], "question_id": 1},
        {"prompt": "P", "question_id": 1, "completion": "Mine."},
        {"prompt": "P", "question_id": 2},
        {"prompt": "P"},
    )
    references = write(tmp_path / "reference.jsonl", {"question_id": 1, "text": "So."})
    found = load_pairs(rows, references)["completion"]
    assert found == ["So.", "So.", "So.", "Mine.", "", ""]


def test_a_question_without_id_is_named_where_references_are_to_be_joined(tmp_path):
    questions = write(tmp_path / "question.jsonl", {"turns": ["Why?"]})
    assert load_pairs(questions)["completion"] == [""]
    references = write(tmp_path / "reference.jsonl", {"question_id": 1, "text": "So."})
    with pytest.raises(ValueError, match=r"question\.jsonl, row 0: question_id is missing"):
        load_pairs(questions, references)


def test_a_reference_that_is_empty_is_none(tmp_path):
    questions = write(tmp_path / "question.jsonl", {"question_id": 1, "turns": ["Why?"]})
    for answer in ({"text": None}, {"choices": []}, {"choices": [], "text": ""}):
        references = write(tmp_path / "reference.jsonl", {"question_id": 1} | answer)
        assert load_pairs(questions, references)["completion"] == [""]


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
        ('{"instruction": "a", "instances": ["b"]}', "row 0: instances holds no objects but 'b'"),
        ('{"question_id": 1, "turns": []}', "row 0: turns is empty"),
        ('{"question_id": 1, "turns": "Why?"}', "row 0: turns is no list but 'Why\\?': a JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', "row 1: plain text and prompts are mixed"),
        ('{"prompt": null, "instruction": ""}', "row 0: prompt is missing"),
        ('["a", "b"]', "cannot be read as json: row 0 is no object but 'a'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(content, message, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(file)


def test_a_text_that_is_none_is_named_by_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b \\ud800"}\n')
    with pytest.raises(ValueError, match="row 0: the answer holds half of a surrogate pair"):
        load_pairs(tmp_path / "a.jsonl")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pairs(tmp_path / "none.jsonl")


def test_answers_of_a_csv_file_are_taken_as_they_are_written(tmp_path):
    answers = ["02139", "2.50", "1e3", "2020-01-01", "None", "NA", "null", "nan", "true", " x "]
    file = tmp_path / "a.csv"
    file.write_text("prompt,completion\n" + "".join(f"Q,{answer}\n" for answer in [*answers, ""]))
    assert load_pairs(file)["completion"] == [*answers, ""]


def test_numbers_dates_and_truths_of_a_json_file_are_taken_as_they_are_written(tmp_path):
    written = ["2.50", "1e3", "12345678901234567890", "0", "true", '"2020-01-01"', '"NA"', "null"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "Q", "completion": {x}}}\n' for x in written))
    assert load_pairs(file)["completion"] == [*(x.strip('"') for x in written[:-1]), ""]


def test_an_input_of_0_is_an_input(tmp_path):
    (pair,) = load_pairs(write(tmp_path / "a.jsonl", {"instruction": "Negate.", "input": 0}))
    assert "### Input:\n0\n\n### Response:\n" in pair["prompt"]


def test_a_row_may_be_a_prompt_or_an_instruction_and_name_its_answer_as_it_likes(tmp_path):
    rows = (
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q", "output": "B"},
        {"prompt": None, "instruction": "Do.", "completion": None, "response": "C"},
    )
    data = load_pairs(write(tmp_path / "a.jsonl", *rows))
    assert data["completion"] == ["A", "B", "C"]
    assert data["prompt"][2] == INSTRUCTION_TEMPLATE.format(instruction="Do.", input="")


def test_references_have_the_question_that_a_number_or_its_text_names(tmp_path):
    questions = write(tmp_path / "question.jsonl", {"question_id": "81", "turns": ["Why?"]})
    references = write(tmp_path / "answer.jsonl", {"question_id": 81, "text": "Because."})
    assert load_pairs(questions, references)["completion"] == ["Because."]


@pytest.mark.parametrize("text", ['[{"prompt": "Q"},\n {"prompt": "R"}]', '{"prompt":\n "Q"}'])
def test_json_may_be_a_list_or_run_over_lines(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert load_pairs(tmp_path / "a.json")["prompt"][0] == "Q"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.xz"])
def test_files_may_begin_with_a_byte_order_mark_and_be_compressed(name, tmp_path):
    """Excel writes the mark; lines end where the file says, not at every separator of Unicode."""
    answer = "one\u2028two\x85three"
    text = f"prompt,completion\r\nQ,{answer}\r\n"
    if "json" in name:
        text = json.dumps({"prompt": "Q", "completion": answer}, ensure_ascii=False)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(name).suffix, open)
    with opener(tmp_path / name, "wb") as file:
        file.write(text.encode("utf-8-sig"))
    assert load_pairs(tmp_path / name).to_list() == [{"prompt": "Q", "completion": answer}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,completion\nHow?,Well, so\n", "as csv: line 2 has more fields than"),
        ("a.csv", b'prompt,completion\nHow?,"So\n', "as csv: unexpected end of data"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.jsonl", b'{"prompt": "\xff"}', "as json: .*can't decode byte 0xff"),
        ("a.jsonl.xz", b"no archive", "cannot be read as json"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(tmp_path / name)


def test_csv_files_of_a_data_set_are_taken_as_they_are_written(tmp_path):
    """`load_dataset` takes a folder where it takes a hub id."""
    answers = ["02139", "2.50", "1e3", "2020-01-01", "None", "NA", "null", "nan", "true"]
    (tmp_path / "test.csv").write_text(
        "prompt;id;completion\n" + "".join(f"Q;;{answer}\n" for answer in [*answers, ""])
    )
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: default, data_files: [{split: test, path: test.csv}], "
        'sep: ";"}\n---\n'
    )
    assert load_pairs(f"{tmp_path}:test")["completion"] == [*answers, ""]


@pytest.mark.parametrize(
    ("answers", "kind"), [("2.50 1e3", "float64"), ('"2020-01-01"', r"timestamp\[s\]")]
)
def test_json_files_of_a_data_set_whose_texts_would_be_changed_are_refused(answers, kind, tmp_path):
    lines = [f'{{"prompt": "Q", "completion": {answer}}}\n' for answer in answers.split()]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=f"column completion datasets makes {kind}: download"):
        load_pairs(tmp_path)
    assert load_pairs(tmp_path / "train.jsonl")["completion"][0] == answers.split()[0].strip('"')


def test_json_files_of_a_data_set_may_hold_whole_numbers_and_other_columns(tmp_path):
    rows = ({"prompt": "Q", "output": 0, "score": 2.5}, {"prompt": "Q", "output": None})
    write(tmp_path / "train.jsonl", *rows)
    assert load_pairs(tmp_path)["completion"] == ["0", ""]


def test_typed_data_sets_keep_their_types_and_an_absent_column_is_null(monkeypatch):
    """Parquet on the hub has one schema: of a row's several columns some are null."""
    rows = [
        {"prompt": "Q", "completion": 2.5, "instruction": None, "output": None},
        {"prompt": None, "completion": None, "instruction": "Do.", "output": "x"},
    ]
    data = Dataset.from_list(rows)
    monkeypatch.setattr("rlkl.data.hub.load_dataset", lambda name, split: data)
    assert load_pairs("some/data")["completion"] == ["2.5", "x"]
