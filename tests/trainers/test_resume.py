"""A run that was interrupted and resumed is the run that was not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlkl.trainers import PPOTrainer, RaoBlackwellPPOTrainer
from rlkl.trainers.resume import check_settings, last_checkpoint
from tests.trainers.stopping import StopAfter, lines, untimed

BY_EPOCH = {f"{what}_strategy": "epoch" for what in ("logging", "eval", "save")}
ADAPTIVE = {"kl_target": 0.5, "kl_horizon": 50, "kl_coef": 0.2}


def step_records(folder: Path) -> list[dict]:
    return [untimed(record) for record in lines(folder) if "kl/rb" in record]


def interrupted(whole: Path, part: Path) -> None:
    """What a run leaves that was killed in its fourth step: a checkpoint of the second."""
    part.mkdir()
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    records = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (part / "metrics.jsonl").write_text("".join(records[:3]))
    completions = (whole / "completions.jsonl").read_text().splitlines(keepends=True)
    (part / "completions.jsonl").write_text("".join(completions[:9]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainer_class": RaoBlackwellPPOTrainer, "num_mini_batches": 2},
        {"separate_value_model": True, "value_learning_rate": 1e-2},
        {"lora": True, "trainer_class": RaoBlackwellPPOTrainer},
    ],
    ids=str,
)
def test_two_steps_and_two_resumed_end_as_four_steps_end(make_trainer, lora, tmp_path, changes):
    changes = dict(changes)
    trainer_class = changes.pop("trainer_class", PPOTrainer)
    if changes.pop("lora", False):
        changes["peft_config"] = lora
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_completions": 3}
    settings = ADAPTIVE | saving | {"log_completions_steps": 1} | changes

    whole = make_trainer(trainer_class, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    interrupted(tmp_path / "whole", tmp_path / "part")
    part = make_trainer(trainer_class, output_dir=str(tmp_path / "part"), **settings)
    part.train(resume_from_checkpoint=True)

    for ours, theirs in ((part.model, whole.model), (part.critic, whole.critic)):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert part.kl_coefficient.value == whole.kl_coefficient.value != ADAPTIVE["kl_coef"]
    assert step_records(tmp_path / "part") == step_records(tmp_path / "whole")
    assert [r["step"] for r in step_records(tmp_path / "part")] == [1, 2, 3, 4]
    assert lines(tmp_path / "part", "completions.jsonl") == lines(
        tmp_path / "whole", "completions.jsonl"
    )


def test_the_optimiser_of_the_critic_is_in_the_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    groups = saved["param_groups"]
    critic = groups[-1]["params"]
    assert len(critic) == 2  # weight and bias of the head
    assert all(saved["state"][index]["exp_avg"].abs().sum() > 0 for index in critic)


def test_a_new_run_in_an_old_folder_starts_its_metrics_anew(make_trainer, tmp_path):
    for seed in (1, 2):
        trainer = make_trainer(seed=seed, num_completions=1, log_completions_steps=1)
        trainer.train()
    assert [r["step"] for r in step_records(tmp_path / "run")] == [1, 2]
    assert len(lines(tmp_path / "run", "completions.jsonl")) == 2


def test_a_record_that_was_cut_while_it_was_written_does_not_stop_a_resume(make_trainer, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**settings).train()
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoint-4")
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:2]) + text[2][:20])
    make_trainer(**settings).train(resume_from_checkpoint=True)
    assert [r["step"] for r in step_records(folder)] == [1, 2, 3, 4]


def test_a_checkpoint_that_has_all_steps_is_loaded_and_takes_no_other(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = make_trainer(**settings)
    whole.train()
    again = make_trainer(**settings)
    assert again.train(resume_from_checkpoint=True).global_step == 2
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert [r["step"] for r in step_records(tmp_path / "run")] == [1, 2]
    longer = make_trainer(max_steps=3, **settings)
    longer.train(resume_from_checkpoint=True)
    assert [r["step"] for r in step_records(tmp_path / "run")] == [1, 2, 3]


def test_resuming_passes_over_a_checkpoint_that_a_kill_cut_short(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make_trainer(**settings).train()
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").unlink()
    make_trainer(**settings).train(resume_from_checkpoint=True)
    assert [r["step"] for r in step_records(tmp_path / "run")] == [1, 2, 3]


def test_a_checkpoint_of_the_model_alone_is_nothing_to_go_on_from(make_trainer, tmp_path):
    """Its schedule began anew, in silence."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(**settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds no optimiser .save_only_model"):
        make_trainer(max_steps=3, **settings).train(resume_from_checkpoint=True)
    assert make_trainer(**settings).train(resume_from_checkpoint=True).global_step == 2


def test_resuming_nothing_says_so(make_trainer):
    with pytest.raises(ValueError, match="holds no whole checkpoint to go on from"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_fixed_coefficient_is_that_of_the_settings_after_a_resume(make_trainer, steps):
    make_trainer(save_strategy="steps", save_steps=1, kl_coef=0.05).train()
    trainer = make_trainer(max_steps=3, kl_coef=0.9)
    trainer.train(resume_from_checkpoint=True)
    assert steps(trainer)[-1]["kl_coef"] == 0.9


def test_the_adaptive_coefficient_rises_above_its_target_and_falls_below(make_trainer, steps):
    for target, rises in ((1e-6, True), (1e3, False)):
        trainer = make_trainer(kl_target=target, kl_horizon=50, max_steps=3)
        trainer.train()
        second, third = (step["kl_coef"] for step in steps(trainer)[1:])
        assert (third > second) == rises


@pytest.mark.parametrize("method", ["ppo", "distill"])
@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({"logging_steps": 3}, 4),
        ({"logging_steps": 4, "dataloader_drop_last": False}, 3),
        ({"logging_strategy": "epoch", "per_device_train_batch_size": 4}, 3),  # an epoch's end
        ({"logging_strategy": "epoch", "per_device_train_batch_size": 4}, 4),  # within an epoch
        ({"per_device_train_batch_size": 4} | BY_EPOCH, 4),
        (
            {
                "logging_steps": 3,
                "max_steps": -1,
                "num_train_epochs": 1.5,
                "per_device_train_batch_size": 2,
            },
            5,
        ),
    ],
    ids=str,
)
def test_the_records_of_a_run_do_not_tell_where_it_was_stopped(
    make_trainer, make_distiller, pairs, tmp_path, method, settings, stop
):
    """Those that average several steps neither."""
    make = make_trainer if method == "ppo" else make_distiller
    settings = {"max_steps": 7, "eval_dataset": pairs} | settings
    whole = make(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    stopped = make(output_dir=str(tmp_path / "part"), **settings)
    stopped.add_callback(StopAfter(stop))
    stopped.train()
    assert stopped.state.global_step == stop < whole.state.global_step
    resumed = make(output_dir=str(tmp_path / "part"), **settings)
    resumed.train(resume_from_checkpoint=True)
    found, expected = (
        [untimed(record) for record in lines(tmp_path / name)] for name in ("part", "whole")
    )
    assert found == expected
    assert "loss" in expected[0]


def test_a_training_starts_without_what_one_that_was_cut_short_had_measured(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, logging_steps=4)

    def reward(prompts, responses):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return torch.zeros(len(responses))

    trainer.reward = reward
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.reward = lambda prompts, responses: torch.ones(len(responses))
    trainer.train()
    assert lines(tmp_path / "run")[0]["objective/scores"] == 1  # of four steps, not of six


@pytest.mark.parametrize(("epochs", "done"), [(0.5, 2), (1.0, 3)])
def test_a_run_of_fractional_epochs_is_known_to_be_done(make_trainer, prompts, epochs, done):
    settings = {"max_steps": -1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "train_dataset": prompts}  # 3 steps an epoch
    whole = make_trainer(num_train_epochs=0.5, **settings)
    whole.train()
    assert whole.state.global_step == 2
    again = make_trainer(num_train_epochs=epochs, **settings)
    assert again.train(resume_from_checkpoint=True).global_step == done


def test_a_distillation_that_an_exception_ended_within_a_step_draws_it_anew(
    make_distiller, monkeypatch
):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1}
    trainer, drawn = make_distiller(on_policy_fraction=1.0, **settings), []
    sample = trainer.sample

    def spied(*arguments):
        drawn.append(sample(*arguments))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return drawn[-1]

    monkeypatch.setattr(trainer, "sample", spied)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert len(drawn) == 5
    assert drawn[0].texts == drawn[2].texts


def test_the_last_checkpoint_is_the_newest_that_is_whole(tmp_path):
    assert last_checkpoint(tmp_path / "nothing") is None
    for step, state in ((9, '{"global_step": 9}\n'), (10, "{}\n"), (11, '{"global_s'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:  # the kill came before it was written
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_other_settings_are_refused_by_name_and_equal_ones_are_not(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"kl_coef": 0.1, "folder": "a/b"}))
    check_settings(file, {"kl_coef": 0.1, "folder": Path("a/b")}, "a run")
    with pytest.raises(ValueError, match=r"holds a run with kl_coef=0.1, not 0.2: choose another"):
        check_settings(file, {"folder": "a/b", "kl_coef": 0.2}, "a run")
