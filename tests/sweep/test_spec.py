"""A sweep's YAML: what it means, and that nonsense is refused before anything starts."""

import re
from dataclasses import asdict, replace
from datetime import date

import pytest
import yaml

from rlkl.sweep.spec import SearchSpec, SweepSpec, iterate_cells
from rlkl.sweep.spec_file import load_spec, spec_yaml


def test_cells_are_the_product_of_the_axes_and_the_seeds(write_spec):
    spec = load_spec(write_spec())
    cells = list(iterate_cells(spec))
    assert spec.num_cells == len(cells) == 8
    assert [seed for _, seed in cells] == [0] * 4 + [1] * 4, "whole curves first"
    first = cells[0][0]
    assert first.label == "k1 kl_coef=0.1"
    assert first.settings["kl_placement"] == "reward"
    assert first.settings["max_steps"] == 4
    assert first.settings["response_length"] == 24, "what is measured is written out"


def test_settings_stand_over_those_of_the_base_config(write_spec, tmp_path):
    (tmp_path / "base.yaml").write_text("max_steps: 50\nkl_coef: 9.0\noutput_dir: elsewhere\n")
    spec = load_spec(write_spec(config="base.yaml", settings={"max_steps": 3}))
    assert spec.configuration(0).settings["max_steps"] == 3
    assert spec.configuration(0).settings["kl_coef"] == 0.1
    assert "output_dir" not in spec.configuration(0).settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"grid": {"kl_coeff": [0.1]}}, "did you mean kl_coef?"),
        ({"settings": {"max_step": 3}}, "did you mean max_steps?"),
        ({"grid": {"kl_coef": [0.1, "much"]}}, "much"),
        ({"grid": {"kl_coef": []}}, "grid.kl_coef"),
        ({"grid": {"kl_coef": 0.1}}, "grid.kl_coef is 0.1; a list"),
        ({"grid": [1, 2]}, "grid is [1, 2]; a mapping"),
        ({"grid": "x"}, "grid is 'x'; a mapping"),
        ({"grid": {"kl_coef": [None, 1.0]}}, "kl_coef is null"),
        ({"grid": {"kl_coef": [float("nan"), 1.0]}}, "grid.kl_coef[0] is nan"),
        ({"grid": {"kl_coef": [float("inf")]}}, "grid.kl_coef[0] is inf"),
        ({"settings": {"seconds_per_step": float("nan")}}, "settings.seconds_per_step is nan"),
        ({"grid": {"kl_coef": ["1e400"]}}, "kl_coef is inf; a finite number is needed"),
        ({"grid": {"kl_coef": ["nan", 1.0]}}, "kl_coef is nan; a finite number is needed"),
        ({"settings": {"seconds_per_step": "-1e400"}}, "seconds_per_step is -inf"),
        ({"grid": {"kl_coef": [0.1, 0.1]}}, "the same"),
        ({"grid": {"kl_coef": [1, 1.0]}}, "the same: fake kl_coef=1, fake kl_coef=1"),
        ({"grid": {"kl_coef": ["0.1", 0.1]}}, "the same"),
        ({"grid": {"kl_coef": [1.0], "both": [{"kl_coef": 2.0}]}}, "set by two axes"),
        ({"grid": {"kl_coef": [[0.1, 1.0]]}}, "kl_coef is [0.1, 1.0]; a number is needed"),
        ({"grid": {"kl_coef": [True]}}, "kl_coef is True; a number is needed"),
        ({"settings": {"max_steps": 4.5}}, "max_steps is 4.5; a whole number is needed"),
        ({"settings": {"max_steps": date(2020, 1, 1)}}, "put a date in quotes"),
        ({"seeds": [2**31]}, "a seed is 2147483648; use less than 2^31"),
        ({"name": " "}, "it names a folder"),
        ({"name": "a\0b"}, "it names a folder"),
        ({"grid": {"seed": [0, 1]}}, "seeds: for seeds"),
        ({"grid": {"response_length": [8, 16]}}, "cannot be varied"),
        ({"grid": {"kl_estimator": ["k9"]}}, "k9"),
        ({"grid": {"kl": [{"kl_estimator": "rb", "kl_placement": "reward"}]}}, "own-token"),
        ({"seeds": [0, 0]}, "stands twice"),
        ({"seeds": []}, "seeds"),
        ({"seeds": ["one"]}, "seeds[0] is 'one'; a whole number >= 0"),
        ({"seeds": [True, False]}, "seeds[0] is True"),
        ({"seeds": 3}, "seeds is 3; a list"),
        ({"name": 5}, "name is 5; text"),
        ({"name": "../outside"}, "it names a folder"),
        ({"recipe": 5}, "recipe is 5; text"),
        ({"settings": [1]}, "settings is [1]; a mapping"),
        ({"recipe": "nowhere.py"}, "no such file"),
        ({"recipe": None}, "names no recipe"),
        ({"config": "nowhere.yaml"}, "no such file"),
        ({"evaluation": {"promts": 3}}, "unknown field 'promts'"),
        ({"evaluation": {"checkpoints": True}}, "keep them"),
        ({"evaluation": [1]}, "evaluation is [1]; a mapping"),
        ({"evaluation": {"prompts": 4}}, "does not declare: model_name_or_path, ref_model_name"),
        ({"evaluation": {"responses_per_prompt": 0}}, "responses_per_prompt is 0"),
        ({"evaluation": {"responses_per_prompt": 1.5}}, "a whole number >= 1"),
        ({"evaluation": {"responses_per_prompt": "x"}}, "evaluation.responses_per_prompt is 'x'"),
        ({"evaluation": {"prompts": 1}}, "evaluation.prompts is 1; a whole number >= 2"),
        ({"evaluation": {"reference_samples": 1}}, "use 0 for none"),
        ({"evaluation": {"reference_samples": -5}}, "reference_samples is -5"),
        ({"evaluation": {"seed": "x"}}, "evaluation.seed is 'x'"),
        ({"heartbeat": 0}, "heartbeat is 0; a number > 0"),
        ({"retries": -1}, "retries is -1"),
        ({"retries": "two"}, "retries is 'two'; a whole number >= 0"),
        ({"minutes_per_cell": -3}, "minutes_per_cell is -3"),
        ({"minutes_per_cell": "x"}, "minutes_per_cell is 'x'"),
        ({"grace": "x"}, "grace is 'x'; a number > 0"),
        ({"grace": 0.1}, "miss a beat"),
        ({"search": [1]}, "search is [1]; a mapping"),
        ({"search": {"configurations": 0, "kl_coef": {"low": 1, "high": 2}}}, "number >= 1"),
        (
            {"search": {"configurations": 2, "seed": -1, "kl_coef": {"low": 1, "high": 2}}},
            "search.seed is -1; a whole number >= 0",
        ),
        (
            {"search": {"configurations": 2, "kl_coef": {"low": 1, "high": 2, "log": "yes"}}},
            "search.kl_coef.log is 'yes'; true or false",
        ),
        (
            {
                "search": {"configurations": 1, "kl_coef": {"low": 1, "high": 2}},
                "grid": {"kl_estimator": ["k1", "rb"]},
            },
            "give at least as many",
        ),
        ({"search": {"configurations": True, "kl_coef": {"low": 1, "high": 2}}}, "is True"),
        ({"search": {"configurations": 4, "kl_coef": {"low": "a", "high": 2}}}, "a number is"),
        (
            {"search": {"configurations": 4, "max_steps": {"low": 1.5, "high": 2}}, "grid": {}},
            "whole where the field is",
        ),
        ({"search": {"configurations": 4, "kl_coef": {"low": 1, "high": 2}}}, "grid and in search"),
        ({"search": {"kl_coef": {"low": 1, "high": 2}}}, "configurations"),
        ({"search": {"configurations": 4}}, "range"),
        ({"search": {"configurations": 4, "kl_coef": {"low": 2, "high": 1}}}, "low < high"),
        ({"search": {"configurations": 4, "sampler": "guess", "kl_coef": {}}}, "guess"),
        ({"search": {"configurations": 4, "kl_coff": {"low": 1, "high": 2}}}, "mean kl_coef?"),
    ],
)
def test_nonsense_is_refused_and_named(write_spec, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load_spec(write_spec(**changes))


def test_a_search_has_the_type_of_the_recipes_field(write_spec):
    limits = {"low": "1e-3", "high": 10, "log": True}  # YAML reads 1e-3 as text
    steps = {"low": 1.0, "high": 4}
    search = {"configurations": 4, "kl_coef": limits, "max_steps": steps}
    fields = load_spec(write_spec(search=search, grid={"kl_estimator": ["k1", "rb"]})).search.fields
    assert fields == {"kl_coef": limits | {"low": 0.001}, "max_steps": {"low": 1, "high": 4}}
    assert [type(fields["kl_coef"][end]) for end in ("low", "high")] == [float, float]
    assert [type(fields["max_steps"][end]) for end in ("low", "high")] == [int, int]


def test_a_coefficient_that_a_sweep_never_names_is_the_recipes(write_spec):
    spec = load_spec(write_spec(grid={"kl_estimator": ["k1", "rb"]}))
    assert spec.configuration(0).settings["kl_coef"] == 0.1
    assert spec.configuration(0).label == "k1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('hello')", "declares no SETTINGS"),
        ("SETTINGS = (int,)", "declares no SETTINGS"),
        ("SETTINGS = int", "declares no SETTINGS"),
        ("import nothing_there", "bare.py cannot be read for its SETTINGS: ModuleNotFoundError"),
        ("def (:", "bare.py cannot be read for its SETTINGS: SyntaxError"),
        ("raise SystemExit(0)", "what it does belongs under if __name__ == '__main__'"),
    ],
)
def test_a_recipe_without_settings_is_refused(write_spec, tmp_path, text, said):
    (tmp_path / "bare.py").write_text(text + "\n")
    with pytest.raises(ValueError, match=re.escape(said)):
        load_spec(write_spec(recipe="bare.py"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"max_steps: 3\nmax_steps: 4\n", "max_steps stands twice"),
        (b"max_steps: '\xe9'\n", "invalid continuation byte"),
        (b"max_steps: [1,\n", "while parsing"),
    ],
)
def test_what_is_no_yaml_is_refused_with_the_name_of_its_file(write_spec, tmp_path, text, said):
    (tmp_path / "base.yaml").write_bytes(text)
    with pytest.raises(yaml.YAMLError, match=said) as refused:
        load_spec(write_spec(config="base.yaml"))
    assert str(tmp_path / "base.yaml") in str(refused.value)


def test_what_a_spec_is_written_as_is_read_again(write_spec, tmp_path):
    (tmp_path / "base.yaml").write_text("max_steps: 7\nkl_coef: 0.3\n")
    search = {"configurations": 6, "sampler": "random", "seconds_per_step": {"low": 1, "high": 2}}
    specs = [
        load_spec(write_spec(**changes))
        for changes in (
            {"config": "base.yaml", "name": "café", "minutes_per_cell": 2.0},
            {"search": search, "grid": {"kl_estimator": ["k1", "rb"]}},
        )
    ]
    for spec in specs:
        again = tmp_path / "again.yaml"
        again.write_text(spec_yaml(asdict(spec)))
        assert load_spec(again) == replace(spec, config=None)


def test_a_spec_survives_the_storage(write_spec):
    spec = load_spec(
        write_spec(
            search={"configurations": 4, "kl_coef": {"low": 0.1, "high": 1.0, "log": True}},
            grid={"kl_estimator": ["k1", "rb"]},
        )
    )
    assert SweepSpec.from_json(spec.to_json()) == spec
    assert isinstance(spec.search, SearchSpec)


@pytest.mark.parametrize(
    ("grid", "arms"),
    [
        ({"kl_estimator": ["k1", "rb"], "kl_coef": [1.0, 2.0]}, ["k1", "rb"]),
        (
            {"e": [{"kl_estimator": "rb", "kl_placement": p} for p in ("loss", "both")]},
            ["loss", "both"],
        ),
        (
            {"kl_estimator": ["k1", "rb"], "lr": [{"learning_rate": x} for x in (1e-3, 1e-4)]},
            [f"{e} learning_rate={x}" for e in ("k1", "rb") for x in ("0.001", "0.0001")],
        ),
        ({"kl_coef": [1.0, 2.0]}, ["fake"]),
        (
            {"learning_rate": [1.00001e-3, 1.00002e-3]},
            ["learning_rate=0.00100001", "learning_rate=0.00100002"],
        ),
    ],
)
def test_arms_are_named_by_what_tells_them_apart(make_spec, grid, arms):
    spec = make_spec(grid=grid)
    assert list(dict.fromkeys(spec.arm_name(arm) for arm in spec.arms)) == arms


def test_a_label_says_what_a_search_chose(make_spec):
    fields = {"learning_rate": {"low": 1e-4, "high": 1e-2}, "kl_coef": {"low": 0.1, "high": 1.0}}
    spec = make_spec(grid={"kl_estimator": ["k1", "rb"]}, search=SearchSpec(fields, 4))
    chosen = spec.configuration(1, {"learning_rate": 0.003, "kl_coef": 0.5})
    assert (chosen.arm, chosen.label) == ("rb", "rb kl_coef=0.5 learning_rate=0.003")


@pytest.mark.parametrize("name", ["sweep_kl", "sweep_kl_mini", "compare_estimators"])
def test_the_shipped_sweeps_are_valid(name):
    from pathlib import Path

    spec = load_spec(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    assert spec.num_cells == {"sweep_kl": 36, "sweep_kl_mini": 8, "compare_estimators": 72}[name]
