"""Settings that every trainer shares."""

import math

import pytest
import torch

from rlkl.trainers import DistillConfig, PPOConfig, PPOTrainer
from rlkl.trainers.run_config import check_numbers


@pytest.mark.parametrize(("tiles", "dots"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_bf16_is_the_default_where_a_cpu_multiplies_it(monkeypatch, tmp_path, tiles, dots):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(tiles))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(dots))

    def bf16(**settings: bool) -> bool | None:
        return PPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings).bf16

    assert bf16() == bool(tiles or dots)
    assert not bf16(bf16=False)
    assert bf16(bf16=True)


@pytest.mark.parametrize(("accelerator", "use_cpu"), [(None, True), ("mps", True), ("cuda", False)])
def test_training_is_on_the_cpu_where_no_accelerator_has_float64(
    monkeypatch, tmp_path, accelerator, use_cpu
):
    """Tokens are drawn in float64."""
    device = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    assert PPOConfig(output_dir=str(tmp_path), bf16=False).use_cpu == use_cpu


def test_a_batch_is_not_multiplied_by_the_number_of_gpus(make_config, make_lm, tokenizer, prompts):
    scored = []

    def reward(prompts: list[str], responses: list[str]) -> torch.Tensor:
        scored.append(len(responses))
        return torch.zeros(len(responses))

    config = make_config(per_device_train_batch_size=4)
    config._n_gpu = 2
    PPOTrainer(make_lm(), reward, config, prompts, tokenizer).train()
    assert scored == [4, 4]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_steps": 0}, "max_steps is 0 .* nothing would be trained; make one"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be at lea"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be finite and >= 0"),
        ({"learning_rate": -1.0}, r"learning_rate is -1\.0; it must be finite and >= 0"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; it must be finite and >= 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan; 0 does not clip"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; 0 does not clip"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs is nan; it must be finite"),
        ({"num_train_epochs": 0.0}, "nothing would be trained; make one of them positive"),
        ({"warmup_steps": float("nan")}, "warmup_steps is nan; give a finite number"),
        ({"adam_beta1": float("nan")}, r"adam_beta1 is nan; it must lie in \[0, 1\)"),
        ({"adam_epsilon": -1.0}, r"adam_epsilon is -1.0; it must be finite and >= 0"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is 0; it must be at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1; 0 reads in this process"),
        ({"fp16": True, "use_cpu": True}, "fp16 has no effect on a CPU: leave it out, or set bf16"),
    ],
)
def test_settings_that_the_training_would_stop_on_or_not_follow_are_refused(
    tmp_path, settings, complaint
):
    for config in (DistillConfig, PPOConfig):
        if not (config is PPOConfig and settings.get("fp16")):  # which says more of it
            with pytest.raises(ValueError, match=complaint):
                config(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("steps", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["logging", "eval", "save"])
def test_steps_after_which_nothing_would_happen_are_refused(tmp_path, what, steps):
    """transformers logs or saves once, at the end, for most of these."""
    asked = {f"{what}_steps": steps, f"{what}_strategy": "steps", "output_dir": str(tmp_path)}
    for config in (DistillConfig, PPOConfig):
        with pytest.raises(ValueError, match=rf"{what}_steps is .*\({what}_strategy no is"):
            config(**asked)
    not_asked = asked | {f"{what}_strategy": "no", f"{what}_steps": 0}
    assert getattr(PPOConfig(**not_asked), f"{what}_steps") == 0


def test_bounds_may_be_infinite_and_nothing_else(tmp_path):
    config = PPOConfig(output_dir=str(tmp_path), cliprange=math.inf, max_grad_norm=math.inf)
    check_numbers(config)
    for name in ("kl_target", "eval_delay", "warmup_steps"):
        with pytest.raises(ValueError, match=f"{name} is inf; give a finite number"):
            PPOConfig(output_dir=str(tmp_path), **{name: math.inf})
