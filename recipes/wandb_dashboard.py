"""Builds a Weights & Biases workspace that compares the arms of a sweep.

    python recipes/wandb_dashboard.py --entity me --project rlkl --sweep sweep_kl

The runs must be there: online from the start, or sent by
`wandb sync runs/sweep_kl/*/run/wandb/offline-run-*`.
Needs a key and the extra `dashboard` (pip install "rlkl[dashboard]").
"""

import argparse

import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces

from rlkl.cli import fail

ARM = "wandb_arm"
"""Where a run's config names its arm: the estimator, its placement, whatever tells curves apart."""


def build_workspace(entity: str, project: str, sweep: str) -> workspaces.Workspace:
    """Panels: reward vs KL, KL by every estimator over steps, standard errors, gradient norms; the
    runs of one sweep, grouped by arm: what the sweep's own page compares.
    """

    def over_steps(title: str, *metrics: str) -> panels.LinePlot:
        return panels.LinePlot(
            title=title,
            x="Step",
            y=[f"train/{metric}" for metric in metrics],
            groupby=panels.Config(ARM),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
        )

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"{sweep}: reward and KL",
        sections=[
            workspaces.Section(
                name="Reward vs KL",
                panels=[
                    panels.ScatterPlot(
                        title="reward vs KL (rb, nats per response), held-out prompts",
                        x=panels.SummaryMetric("kl_rb"),
                        y=panels.SummaryMetric("reward_after"),
                        z=panels.Config("kl_coef"),
                    ),
                    panels.ScatterPlot(
                        title="judge vs KL, held-out prompts",
                        x=panels.SummaryMetric("kl_rb"),
                        y=panels.SummaryMetric("judge_after"),
                        z=panels.Config("kl_coef"),
                    ),
                    over_steps("reward over steps", "objective/scores"),
                    over_steps("judge over steps", "judge/held_out"),
                ],
                is_open=True,
            ),
            workspaces.Section(
                name="KL by every estimator, nats per response",
                panels=[over_steps(f"KL by {name}", f"kl/{name}") for name in ("rb", "k1", "k3")],
                is_open=True,
            ),
            workspaces.Section(
                name="Standard errors",
                panels=[
                    over_steps(f"standard error of {name}", f"kl/{name}_se")
                    for name in ("rb", "k1", "k3")
                ],
                is_open=True,
            ),
            workspaces.Section(
                name="Gradients",
                panels=[
                    over_steps("gradient norm, before clipping", "grad_norm"),
                    over_steps("policy ratio outside the clip range", "policy/clipfrac_avg"),
                ],
                is_open=True,
            ),
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=[workspaces.Metric("group") == sweep],
            groupby=[workspaces.Config(ARM)],
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="rlkl", help="W&B project")
    parser.add_argument("--sweep", required=True, help="name of the sweep: the runs' group")
    given = parser.parse_args()
    if not wandb.login(prompt=False, verify=False):
        fail("a workspace lives on the server: run `wandb login` or set WANDB_API_KEY first")
    workspace = build_workspace(given.entity, given.project, given.sweep)
    workspace.save()
    print(workspace.url)


if __name__ == "__main__":
    main()
