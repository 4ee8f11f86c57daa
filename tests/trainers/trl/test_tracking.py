"""W&B without a key, and gradient checkpointing, which TRL has on by default."""

import pytest

from tests.offline_wandb import history, offline_records, without_key
from tests.trainers.trl.cases import both_trainers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # W&B's own
@both_trainers
def test_a_run_is_one_offline_run_with_every_step(
    monkeypatch, make_trl_trainer, tmp_path, trainer_class
):
    without_key(monkeypatch, tmp_path)
    trainer = make_trl_trainer(trainer_class, report_to=["wandb"], max_steps=2)
    trainer.train()
    records = offline_records(tmp_path / "run")
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.project == "rlkl"
    assert run.run_group == f"{trainer._name.lower()}-rb-both"
    assert {"rb", "both", trainer._name.lower()} <= set(run.tags)
    logged = [row for row in history(records) if "train/kl/rb" in row]
    assert [row["train/kl/rb"] for row in logged] == [
        log["kl/rb"] for log in trainer.state.log_history if "kl/rb" in log
    ]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # TRL's own
@both_trainers
def test_checkpointed_activations_give_the_same_step(make_trl_trainer, trainer_class):
    losses = []
    for checkpointed in (False, True):
        trainer = make_trl_trainer(
            trainer_class, activation_checkpointing=checkpointed, max_steps=2
        )
        trainer.train()
        losses.append([x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
