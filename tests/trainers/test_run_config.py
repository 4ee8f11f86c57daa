"""Settings that every trainer shares."""

import pytest
import torch

from rlkl.trainers import DistillConfig, PPOConfig, PPOTrainer


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
        ({"num_train_epochs": float("nan")}, "num_train_epochs is nan; it must be finite"),
        ({"fp16": True, "use_cpu": True}, "fp16 has no effect on a CPU: leave it out, or set bf16"),
    ],
)
def test_settings_that_the_training_would_stop_on_or_not_follow_are_refused(
    tmp_path, settings, complaint
):
    with pytest.raises(ValueError, match=complaint):
        DistillConfig(output_dir=str(tmp_path), **settings)
