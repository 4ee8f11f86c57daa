"""W&B offline: the summary run of a sweep and the settings that the runs of its cells get."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import wandb

from rlkl.sweep.ledger import open_ledger
from rlkl.sweep.records import SweepResult
from rlkl.sweep.report import write_report
from rlkl.sweep.tracking import log_summary
from rlkl.sweep.worker import Worker, wandb_id
from rlkl.trainers.run_config import RunArguments
from rlkl.trainers.tracking import wandb_mode
from tests.offline_wandb import offline_records

# wandb's own code under Python 3.11 and pydantic 2
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")


def test_the_summary_run_has_table_charts_numbers_and_the_page(
    make_result: Callable[..., SweepResult], tmp_path: Path
) -> None:
    result = make_result()
    analysis = write_report(result, tmp_path)
    log_summary(analysis, tmp_path, "identity")
    assert wandb.run is None

    found = offline_records(tmp_path)
    run = next(r.run for r in found if r.HasField("run"))
    assert (run.run_group, run.job_type, run.project) == ("made", "summary", "rlkl")
    assert run.run_id == wandb_id("identity", "summary")
    assert set(run.tags) == {"summary", "k1", "rb"}

    history = [item for r in found if r.HasField("history") for item in r.history.item]
    keys = {i.key or "/".join(i.nested_key) for i in history}
    charts = ("frontier", "reward_vs_kl", "attainment", "share_on_front")
    assert all(any(chart in key for key in keys) for chart in charts), keys
    summary = {}
    for record in found:
        if record.HasField("summary"):
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    share = analysis.reward.share_on_front["rb"].value
    assert summary["reward/share_on_front/rb"] == pytest.approx(share)
    assert "At equal KL" in summary["findings"]
    tables = [json.loads(p.read_text()) for p in (tmp_path / "wandb").rglob("*.table.json")]
    frontier = next(t for t in tables if "on_front" in t["columns"])
    assert len(frontier["data"]) == len(result.points)
    artifacts = [r.request.log_artifact.artifact for r in found if r.HasField("request")]
    artifacts += [r.artifact for r in found if r.HasField("artifact")]
    files = {e.path for a in artifacts if a.type == "report" for e in a.manifest.contents}
    assert "index.html" in files


def test_the_runs_of_the_cells_are_one_group_with_ids_that_outlast_attempts(make_spec, tmp_path):
    spec = make_spec(settings={"report_to": "wandb", "max_steps": 4})
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", spec, "identity")
    ledger.add_configuration(spec.configuration(0), 0)
    worker = Worker(ledger, tmp_path, threads=1)
    settings = [worker.settings(cell, tmp_path / cell.key) for cell in ledger.cells()]
    assert {s["wandb_group"] for s in settings} == {"fake"}
    assert settings[0]["wandb_tags"] == ["k1", "kl_coef=0.1", "seed=0"]
    assert settings[0]["wandb_arm"] == "k1"
    assert settings[0]["run_name"] == "k1 kl_coef=0.1 seed=0"
    ids = [s["wandb_run_id"] for s in settings]
    assert len(set(ids)) == len(ids)
    ledger.release(ledger.claim("first"))
    again = ledger.claim("second")
    assert worker.settings(again, tmp_path)["wandb_run_id"] == ids[0]


@pytest.mark.parametrize("tags", [["mine", "second"], "mine", []], ids=str)
def test_the_tags_of_a_sweep_are_added_to(make_spec, tmp_path, tags):
    own = ["k1", "kl_coef=0.1", "seed=0"]
    spec = make_spec(settings={"report_to": "wandb", "wandb_tags": tags})
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", spec, "identity")
    ledger.add_configuration(spec.configuration(0), 0)
    settings = Worker(ledger, tmp_path, threads=1).settings(ledger.cells()[0], tmp_path)
    assert settings["wandb_tags"] == [*(["mine"] if tags == "mine" else tags), *own]


def test_online_without_a_key_says_what_to_do_and_goes_on_offline(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda *, prompt, verify: False)
    assert wandb_mode() == "offline"
    assert "wandb login" in capsys.readouterr().err
    monkeypatch.setattr(wandb, "login", lambda *, prompt, verify: True)
    assert wandb_mode() == "online"


def test_the_dashboard_has_the_panels_that_compare_estimators():
    import runpy

    recipe = Path(__file__).parents[2] / "recipes" / "wandb_dashboard.py"
    workspace = runpy.run_path(str(recipe))["build_workspace"]("me", "rlkl", "sweep_kl")
    titles = " ".join(p.title for section in workspace.sections for p in section.panels)
    for panel in ("reward vs KL", "KL by k1", "standard error of rb", "gradient norm"):
        assert panel in titles


def test_the_dashboard_averages_the_runs_of_one_arm_and_no_others(make_spec, tmp_path):
    """Placements of one estimator are arms of their own, as on the sweep's page."""
    import runpy

    from wandb_workspaces.reports.v2 import LinePlot

    grid = {"kl_estimator": ["k1", "rb"], "kl_placement": ["reward", "loss"]}
    spec = make_spec(grid=grid, settings={"report_to": "wandb"})
    ledger = open_ledger(f"sqlite:///{tmp_path}/sweep.db", spec, "identity")
    for number in range(4):
        ledger.add_configuration(spec.configuration(number), number)
    worker = Worker(ledger, tmp_path, threads=1)
    cells = [(cell, worker.settings(cell, tmp_path)) for cell in ledger.cells()]

    recipe = Path(__file__).parents[2] / "recipes" / "wandb_dashboard.py"
    workspace = runpy.run_path(str(recipe))["build_workspace"]("me", "rlkl", "sweep_kl")
    (of_runs,) = {key.name for key in workspace.runset_settings.groupby}
    plots = [p for s in workspace.sections for p in s.panels if isinstance(p, LinePlot)]
    assert {p.groupby.name for p in plots} == {of_runs}
    assert [settings[of_runs] for _, settings in cells] == [cell.arm for cell, _ in cells]
    assert len({settings[of_runs] for _, settings in cells}) == 4
    assert of_runs in {f.name for f in fields(RunArguments)}, "what W&B's config has"
