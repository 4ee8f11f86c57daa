"""The recipe of coverage: what a run that was killed has left."""

import runpy
from pathlib import Path

import pytest

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "kl_coverage.py"))


def test_a_record_that_a_kill_has_cut_is_dropped_and_the_next_stands_on_a_line_of_its_own(tmp_path):
    args = RECIPE["CoverageArguments"](policy="embedded")
    assert RECIPE["earlier_records"](tmp_path, args) == []
    file = tmp_path / "repetitions.jsonl"
    file.write_text('{"truth": 1.0, "se": 0.1}\n{"k1": {"stde')
    records = RECIPE["earlier_records"](tmp_path, args)
    assert records == [{"truth": 1.0, "se": 0.1}]
    RECIPE["keep"](tmp_path, records, {"k1": 2})
    assert RECIPE["earlier_records"](tmp_path, args) == records
    other = RECIPE["CoverageArguments"](policy="embedded", num_samples=7)
    with pytest.raises(ValueError, match="records of other settings"):
        RECIPE["earlier_records"](tmp_path, other)
