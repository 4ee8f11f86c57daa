"""A sweep on Weights & Biases: the summary run beside the runs of its cells, in their group."""

from pathlib import Path
from typing import Any

import wandb

from rlkl.sweep.export import Analysis, point_rows
from rlkl.sweep.figures import title_of
from rlkl.sweep.findings import findings
from rlkl.sweep.worker import wandb_id
from rlkl.trainers.tracking import wandb_mode


def log_summary(analysis: Analysis, folder: Path, identity: str) -> None:
    """Logs the frontier table, charts and the report to the sweep's summary run.

    The run is in the group of the sweep, has the job type ``summary``, and keeps its id over
    reports. Without a key it is written to ``<folder>/wandb`` for `wandb sync`.
    """
    result = analysis.result
    run = wandb.init(
        project=str(result.spec.get("settings", {}).get("wandb_project", "rlkl")),
        group=result.name,
        job_type="summary",
        name=f"{result.name} summary",
        tags=["summary", *result.arms],
        config=result.spec,
        dir=str(folder),
        id=wandb_id(identity, "summary"),
        resume="allow",
        mode=wandb_mode(),  # pyright: ignore[reportArgumentType]
        settings=wandb.Settings(silent=True, console="off"),
    )
    with run:
        run.log(_charts(analysis))
        run.summary.update(_numbers(analysis))
        run.summary["findings"] = "\n".join(line["text"] for line in findings(analysis))
        artifact = wandb.Artifact(f"{run.id}-report", type="report")
        for name in ("index.html", "frontier.png", "frontier.pdf", "points.csv", "records.jsonl"):
            artifact.add_file(str(folder / name))
        run.log_artifact(artifact)


_COLUMNS = (
    "run_id",
    "arm",
    "algorithm",
    "kl_coef",
    "seed",
    "step",
    "kl",
    "kl_se",
    "reward",
    "reward_se",
)
_COLUMNS += ("judge", "judge_se", "on_front", "efficiency", "efficiency_se")


def _charts(analysis: Analysis) -> dict[str, Any]:
    rows = point_rows(analysis)
    table = wandb.Table(
        columns=list(_COLUMNS), data=[[row.get(name) for name in _COLUMNS] for row in rows]
    )
    charts: dict[str, Any] = {"frontier": table}
    charts["reward_vs_kl"] = wandb.plot.scatter(table, "kl", "reward", title="reward vs KL (nats)")
    arms, front = analysis.result.arms, analysis.reward
    charts["attainment"] = wandb.plot.line_series(
        xs=front.kls,
        ys=[[e.value for e in front.attained[arm]] for arm in arms],
        keys=arms,
        title=f"{title_of('reward')} attained by half of the seeds",
        xname="KL (nats)",
    )
    shares = wandb.Table(
        columns=["arm", "share"], data=[[a, front.share_on_front[a].value] for a in arms]
    )
    charts["share_on_front"] = wandb.plot.bar(shares, "arm", "share", title="share of the front")
    return charts


def _numbers(analysis: Analysis) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for front in (analysis.reward, analysis.judge):
        if front is None:
            continue
        for arm in analysis.result.arms:
            numbers[f"{front.measure}/share_on_front/{arm}"] = front.share_on_front[arm].value
            if arm in front.hypervolume:  # every configuration has a run
                numbers[f"{front.measure}/hypervolume/{arm}"] = front.hypervolume[arm].value
        for comparison in front.comparisons:
            name = f"{front.measure}/at_equal_kl/{comparison.first}-{comparison.second}"
            numbers[name] = comparison.mean.value
    return numbers
