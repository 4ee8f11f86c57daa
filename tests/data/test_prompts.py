"""Prompts and reviews from files: what is read, and what is refused in one line."""

import json
import lzma

import pytest
from datasets import Dataset, DatasetDict

from rlkl.data import clean_text, load_pairs, load_prompts, load_reviews


def test_a_text_file_holds_one_prompt_a_line_and_blank_lines_are_none(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The film\n\nA plot that  \n", encoding="utf-8")
    assert load_prompts(path)["prompt"] == ["The film", "A plot that"]


def test_jsonl_and_csv_are_read_by_column(tmp_path):
    rows = [{"opening": "The film", "id": 1}, {"opening": 'A "plot", that', "id": 2}]
    lines, table = tmp_path / "p.jsonl", tmp_path / "p.csv"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.write_text('opening,id\nThe film,1\n"A ""plot"", that",2\n')
    for path in (lines, table):
        data = load_prompts(path, column="opening")
        assert data.column_names == ["prompt"]
        assert data["prompt"] == ["The film", 'A "plot", that']


def test_a_csv_field_may_hold_a_line_break(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt\n"two\nlines"\n')
    assert load_prompts(path)["prompt"] == ["two\nlines"]


def test_a_line_separator_inside_a_json_text_is_no_end_of_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False), encoding="utf-8")
    assert load_prompts(path)["prompt"] == ["one\u2028two"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.csv", "prompt\r\na film\r\n"), ("p.txt", "a film"), ("p.jsonl", '{"prompt": "a film"}')],
)
def test_files_may_begin_with_a_byte_order_mark(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")  # as Excel and Notepad write
    assert load_prompts(tmp_path / name)["prompt"] == ["a film"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file of prompts: .*none\.txt"):
        load_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.txt", "\n\n", "holds no prompts"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "prompt 1 is empty .1 of 2 are.: le"),
        ("p.csv", 'prompt,x\na,1\n"",2\n', "p.csv: prompt 1 is empty"),
        ("p.jsonl", '{"text": "a"}\n', r"has the columns \['text'\], not 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"row 1, has the columns \['text'\]"),
        ("p.jsonl", '{"prompt": null}\n', "p.jsonl: prompt 0 is no text but None: leave"),
        ("p.csv", "x,y\n1,2\n", r"p.csv, row 0, has the columns \['x', 'y'\], not 'prompt': name"),
        ("p.csv", "prompt,y\na film, a plot,2\n", "line 2 has more fields than the header"),
        ("p.csv", 'prompt\n"a film\na plot\n', "cannot be read as csv: unexpected end of data"),
        ("p.txt", "caf\udce9\n", "p.txt is not text in UTF-8"),
        ("p.csv", "prompt\ncaf\udce9\n", "p.csv cannot be read as csv: 'utf-8'"),
        (
            "p.jsonl",
            '{"prompt": "a \\ud800"}\n',
            r"prompt 0 holds half of a surrogate pair, .*ud800",
        ),
        ("p.jsonl", '{"prompt": 0}\n', "prompt 0 is no text but 0"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', "become a text by .*apply_chat_template"),
        ("p.jsonl", "not json\n", r"p.jsonl, line 1 is no JSON object: 'not json'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
    ],
)
def test_bad_prompts_are_one_line_of_value_error(tmp_path, name, text, complaint):
    path = tmp_path / name
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=complaint) as error:
        load_prompts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_prompts, load_pairs, load_reviews])
def test_what_is_no_file_that_is_read_and_no_data_set_is_named(load, tmp_path, monkeypatch):
    def unreachable(name, **options):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr("rlkl.data.hub.load_dataset", unreachable)
    (tmp_path / "prompts.tsv").write_text("a film\n")
    with pytest.raises(ValueError, match=r"prompts\.tsv is a file of a kind .* convert it to \."):
        load(str(tmp_path / "prompts.tsv"))
    with pytest.raises(ValueError, match="my/data is no file and no folder here, and the hub does"):
        load("my/data")
    with pytest.raises(ValueError, match="the name of a data set is empty"):
        load("")


def test_a_folder_whose_files_are_broken_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": \n')
    with pytest.raises(ValueError, match=r"the folder .* cannot be read as a data set"):
        load_prompts(tmp_path)


def test_reviews_are_cleaned_of_markup_and_keep_their_label(tmp_path):
    path = tmp_path / "reviews.jsonl.xz"
    with lzma.open(path, "wt") as file:
        file.write(json.dumps({"text": "Dull.<br /><br />Truly\n dull. ", "label": 0}) + "\n")
    data = load_reviews(str(path))
    assert data["text"] == ["Dull. Truly dull."]
    assert data["label"] == [0]


def test_reviews_without_text_are_refused_and_missing_files_named(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match="a 'text' column is needed"):
        load_reviews(str(path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_reviews(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"text": "Dull."}\n{"text": null}\n', "the text of row 1 is no text but None"),
        ('{"text": 2.50}\n', "the text of row 0 is no text but 2.5"),
        ('{"text": "2020-01-01"}\n', "the text of row 0 is no text but datetime"),
    ],
)
def test_reviews_that_are_no_texts_are_refused(tmp_path, text, found):
    path = tmp_path / "reviews.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"reviews.jsonl: {found}.*: leave such rows out"):
        load_reviews(str(path))


def test_cleaning_twice_changes_nothing():
    text = "  A<br>film.<BR/>\tGood "
    assert clean_text(clean_text(text)) == clean_text(text)


def test_a_data_set_in_a_folder_is_read_by_split(tmp_path):
    data = Dataset.from_dict({"text": ["a film", "a plot"]})
    data.save_to_disk(tmp_path / "one")
    assert load_prompts(tmp_path / "one", "text")["prompt"] == ["a film", "a plot"]
    DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    assert len(load_prompts(f"{tmp_path / 'splits'}:test", "text")) == 2
    with pytest.raises(ValueError, match="has the splits test, not 'train'"):
        load_prompts(tmp_path / "splits", "text")


def test_prompts_of_a_data_set_are_texts(tmp_path):
    Dataset.from_dict({"prompt": ["a film", None]}).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="one: prompt 1 is no text but None: leave such rows out"):
        load_prompts(tmp_path / "one")
