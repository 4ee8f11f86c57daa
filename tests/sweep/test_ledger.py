"""The ledger: of many workers one gets a cell, and a cell ends once; on SQLite and PostgreSQL."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from rlkl.sweep.driver import begin_sweep
from rlkl.sweep.ledger import SWEEPS, Ledger, open_ledger, sweep_names
from rlkl.sweep.spec import SweepSpec
from rlkl.sweep.storage import engine_of
from rlkl.sweep.study import ConfigurationStudy

RECORD = {"points": [{"kl": 1.0, "reward": 2.0}], "samples": []}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/sweep.db"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def begin(url: str, make_spec: Callable[..., SweepSpec], request: pytest.FixtureRequest):
    def begin(**changes) -> Ledger:
        spec = make_spec(name=request.node.name, **changes)
        ledger = open_ledger(url, spec, "identity")
        for number in range(spec.num_configurations):
            ledger.add_configuration(spec.configuration(number), number)
        return ledger

    return begin


def test_every_cell_is_claimed_by_exactly_one_of_many_workers_at_once(begin):
    ledger = begin(seeds=[0, 1, 2, 3, 4], grace=60.0)
    taken: list[str] = []

    def take(name: str) -> None:
        own = Ledger(ledger.url, ledger.name)
        while (cell := own.claim(name)) is not None:
            taken.append(cell.key)

    threads = [threading.Thread(target=take, args=(f"worker {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 20
    assert len(set(taken)) == 20


def test_a_silent_workers_cell_is_taken_over_and_its_late_result_is_refused(begin):
    ledger = begin(grid={"kl_coef": [0.1]}, seeds=[0], grace=0.3, heartbeat=0.1)
    first = ledger.claim("first")
    assert ledger.claim("second") is None
    time.sleep(0.4)
    second = ledger.claim("second")
    assert second.key == first.key
    assert not ledger.heartbeat(first, 0.5)
    assert not ledger.finish(first, RECORD)
    assert not ledger.fail(first, "late")
    assert ledger.finish(second, RECORD)
    assert not ledger.finish(second, RECORD), "a cell ends once"
    assert ledger.cell(first.key).record == RECORD
    assert [a["outcome"] for a in ledger.attempts()] == ["lost", "done"]


def test_signs_of_life_keep_a_cell(begin):
    ledger = begin(grid={"kl_coef": [0.1]}, seeds=[0], grace=0.4, heartbeat=0.1)
    cell = ledger.claim("first")
    for _ in range(4):
        time.sleep(0.15)
        assert ledger.heartbeat(cell, 0.5)
    assert ledger.claim("second") is None
    assert ledger.cell(cell.key).progress == 0.5


def test_a_failing_cell_is_retried_so_often_and_then_failed_with_its_note(begin):
    ledger = begin(grid={"kl_coef": [0.1]}, seeds=[0], retries=2)
    for attempt in range(3):
        cell = ledger.claim("worker")
        assert cell.attempt == attempt + 1
        ledger.fail(cell, f"attempt {cell.attempt}: no memory")
    assert ledger.claim("worker") is None
    assert ledger.cells()[0].state == "failed"
    assert ledger.cells()[0].error == "attempt 3: no memory"
    assert [a["outcome"] for a in ledger.attempts()] == ["failed"] * 3
    assert ledger.retry() == 1
    again = ledger.claim("worker")
    assert again.attempt == 4
    assert again.failures == 0


def test_a_cell_whose_workers_always_vanish_is_given_up(begin):
    ledger = begin(grid={"kl_coef": [0.1]}, seeds=[0], grace=0.03, heartbeat=0.01, lost_retries=2)
    for _ in range(3):
        assert ledger.claim("worker") is not None
        time.sleep(0.05)
    assert ledger.claim("worker") is None
    assert ledger.cells()[0].state == "failed"
    assert "vanished 3 times" in str(ledger.cells()[0].error)


def test_a_stopped_cell_waits_again_without_counting_as_failed(begin):
    ledger = begin(grid={"kl_coef": [0.1]}, seeds=[0], retries=0)
    for _ in range(3):
        ledger.release(ledger.claim("worker"))
    assert ledger.cells()[0].state == "waiting"
    assert ledger.cells()[0].failures == 0


def test_adding_a_configuration_twice_adds_it_once(begin):
    ledger = begin()
    assert not ledger.add_configuration(ledger.spec.configuration(0), 99)
    assert len(ledger.cells()) == 8


def test_another_sweep_under_the_same_name_is_refused(begin, make_spec):
    ledger = begin()
    other = make_spec(name=ledger.name, grid={"kl_coef": [0.5]})
    with pytest.raises(ValueError, match="other grid"):
        open_ledger(ledger.url, other, "identity")


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("sqlite://", "ends with its process: name a file"),
        ("sqlite:///:memory:", "ends with its process: name a file"),
        ("mysql://me@host/name", "no address such as sqlite:///file.db or postgresql://"),
        ("sqlite:///file:{}/sweep.db?mode=ro&uri=true", "cannot write to sqlite"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_in_words(tmp_path, make_spec, storage, said):
    open_ledger(f"sqlite:///{tmp_path}/sweep.db", make_spec(name="first"), "identity")
    with pytest.raises(ValueError, match=re.escape(said)):
        open_ledger(storage.format(tmp_path), make_spec(), "identity")


def test_a_folder_of_another_sweep_is_refused_before_the_storage_knows_of_it(tmp_path, make_spec):
    cell = tmp_path / "out" / "000-seed0"
    cell.mkdir(parents=True)
    (cell / "cell.json").write_text('{"sweep": "another"}')
    url = f"sqlite:///{tmp_path}/sweep.db"
    with pytest.raises(ValueError, match="choose another --out"):
        begin_sweep(make_spec(), url, tmp_path / "out")
    assert sweep_names(engine_of(url)) == []


@pytest.mark.parametrize(
    ("name", "other"),
    [("recipe", "/elsewhere/recipe.py"), ("retries", 9), ("heartbeat", 0.3), ("grace", 60.0)],
)
def test_a_sweep_does_not_go_on_as_another_one_in_silence(tmp_path, make_spec, name, other):
    url = f"sqlite:///{tmp_path}/sweep.db"
    open_ledger(url, make_spec(), "identity")
    assert open_ledger(url, make_spec(minutes_per_cell=2.0), "identity").name == "fake"
    with pytest.raises(ValueError, match=f"other {name}"):
        open_ledger(url, make_spec(**{name: other}), "identity")


def test_a_sweep_begun_before_a_field_was_stored_goes_on_where_that_is_null(tmp_path, make_spec):
    url, settings = f"sqlite:///{tmp_path}/sweep.db", {"max_steps": 4}
    open_ledger(url, make_spec(settings=settings), "identity")
    later = make_spec(settings=settings | {"max_prompt_length": None})
    assert open_ledger(url, later, "identity").spec.settings == settings
    for changed in ({"max_prompt_length": 64}, {"learning_rate": None}):
        with pytest.raises(ValueError, match="other settings"):
            open_ledger(url, make_spec(settings=settings | changed), "identity")
    with pytest.raises(ValueError, match="other settings"):
        open_ledger(url, make_spec(settings={}), "identity")


def test_a_sweep_stored_before_algorithms_could_be_swept_goes_on(tmp_path, make_spec):
    url, spec = f"sqlite:///{tmp_path}/sweep.db", make_spec()
    ledger = open_ledger(url, spec, "identity")
    stored = json.loads(spec.to_json())
    old = {k: v for k, v in stored.items() if k not in ("algorithm", "defaults")}
    assert len(old) == len(stored) - 2
    with ledger.engine.begin() as db:
        db.execute(sa.update(SWEEPS).values(spec=json.dumps(old)))
    assert open_ledger(url, spec, "identity").spec == spec
    assert Ledger(url).spec == spec


def test_a_grids_configurations_are_trials_with_the_means_of_their_seeds(url, make_spec, request):
    ledger = open_ledger(url, make_spec(name=request.node.name), "identity")
    study = ConfigurationStudy(ledger)
    study.settle()
    study.settle()
    assert len(ledger.cells()) == 8
    while (cell := ledger.claim("worker")) is not None:
        point = {"kl": 2.0 + cell.seed, "reward": 4.0 + cell.seed}
        ledger.finish(cell, {"points": [point], "samples": []})
    ConfigurationStudy(ledger).settle()
    trials = study.study.get_trials()
    assert [trial.values for trial in trials] == [[2.5, 4.5]] * 4
    assert [t.params["kl_coef"] for t in trials] == [0.1, 1.0, 0.1, 1.0]
    assert study.study.best_trials


@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "another process"])
def test_a_study_is_told_of_cells_that_a_retry_rescues(url, make_spec, request, fresh):
    """A configuration with one of two seeds is told again with both, one without any at last; each
    once, whoever asks.
    """
    grid = {"kl_coef": [0.1, 1.0, 2.0]}
    spec = make_spec(name=request.node.name, grid=grid, retries=0)
    ledger = open_ledger(url, spec, "identity")
    study = ConfigurationStudy(ledger)
    study.settle()

    def end_all(*fails: str) -> None:
        while (cell := ledger.claim("worker")) is not None:
            point = {"kl": 2.0 + cell.seed, "reward": 4.0 + cell.seed}
            record = {"points": [point], "samples": []}
            ledger.fail(cell, "no memory") if cell.key in fails else ledger.finish(cell, record)

    end_all("000-seed1", "001-seed0", "001-seed1")
    study.settle()
    assert [t.values for t in study.study.get_trials()] == [[2.0, 4.0], None, [2.5, 4.5]]
    assert ledger.retry() == 3
    study.settle()
    end_all("001-seed0")
    for _ in range(2):
        study = ConfigurationStudy(ledger) if fresh else study
        study.settle()
    told = study.study.get_trials()
    assert [t.values for t in told[3:]] == [[2.5, 4.5], [3.0, 5.0]]
    assert [t.params for t in told[3:]] == [{"kl_coef": 0.1}, {"kl_coef": 1.0}]
    assert [t.user_attrs["configuration"] for t in told[3:]] == [0, 1]


def test_a_search_asks_in_turns_for_each_arm_and_learns_from_what_it_is_told(
    url, make_spec, request
):
    from rlkl.sweep.spec import SearchSpec

    search = SearchSpec({"kl_coef": {"low": 0.01, "high": 10.0, "log": True}}, configurations=6)
    grid = {"kl_estimator": ["k1", "rb"]}
    spec = make_spec(name=request.node.name, grid=grid, search=search, seeds=[0])
    ledger = open_ledger(url, spec, "identity")
    study = ConfigurationStudy(ledger)
    study.settle()
    while (cell := ledger.claim("worker")) is not None:
        point = {"kl": 1 / cell.settings["kl_coef"], "reward": 1 - cell.settings["kl_coef"]}
        ledger.finish(cell, {"points": [point], "samples": []})
        study = ConfigurationStudy(ledger)  # another process each time
        study.settle()
    cells = ledger.cells()
    assert len(cells) == 6
    assert [c.arm for c in cells] == ["k1", "rb"] * 3
    assert len({c.settings["kl_coef"] for c in cells}) == 6, "none draws what another has drawn"
    assert all(0.01 <= c.settings["kl_coef"] <= 10 for c in cells)
    assert all(trial.state.is_finished() for trial in study.study.get_trials())
