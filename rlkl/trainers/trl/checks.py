"""What TRL's settings and models must be for the exact KL of a sequence to be what is trained."""

import math

import torch
from torch import nn
from trl import GRPOConfig, RLOOConfig

from rlkl.models.language_model import trunk_of
from rlkl.trainers.processes import check_processes
from rlkl.trainers.run_config import check_fp16, check_intervals, check_numbers, check_training


def check_settings(args: RLOOConfig | GRPOConfig) -> None:
    """Refuses settings under which the loss would follow another gradient than the objective's.

    Raises:
        ValueError: names the setting, what it does, and what to set.
    """
    refused = {
        "top_p": (args.top_p == 1, "truncates the sampler, whose KL is another: set 1.0"),
        "top_k": (not args.top_k, "truncates the sampler, whose KL is another: set 0"),
        "min_p": (not args.min_p, "truncates the sampler, whose KL is another: leave it None"),
        "repetition_penalty": (
            args.repetition_penalty == 1,
            "samples from other distributions than those that are measured: set 1.0",
        ),
        "generation_kwargs": (
            not args.generation_kwargs,
            "may sample from other distributions than those that are measured: leave it None "
            "(temperature and max_completion_length are settings of their own)",
        ),
        "mask_truncated_completions": (
            not args.mask_truncated_completions,
            "leaves the KL of long responses out: set False",
        ),
        "sync_ref_model": (
            not args.sync_ref_model,
            "moves the reference, from which the KL is to be held: set False",
        ),
        "temperature": (0 < args.temperature < math.inf, "must be positive and finite"),
        "beta": (
            0 <= args.beta < math.inf,
            "must be finite, and at least 0 (0 measures the KL all the same)",
        ),
        "num_iterations": (args.num_iterations > 0, "must be at least 1"),
        "steps_per_generation": ((args.steps_per_generation or 0) > 0, "must be at least 1"),
        "num_generations_eval": (
            args.num_generations_eval is None or args.num_generations_eval > 0,
            "must be at least 1 (None: num_generations)",
        ),
        "epsilon": (args.epsilon > 0, "is how far a ratio may be from 1: give more than 0"),
        "epsilon_high": (
            args.epsilon_high is None or args.epsilon_high > 0,
            "is how far a ratio may be above 1: give more than 0 (None: epsilon)",
        ),
        "neftune_noise_alpha": (
            not args.neftune_noise_alpha,
            "adds noise to the policy, which is then never the reference: leave it None",
        ),
        "label_smoothing_factor": (
            not args.label_smoothing_factor,
            "is for losses of transformers' own, and has no effect: leave it out",
        ),
    }
    if isinstance(args, RLOOConfig):
        limits = args.reward_clip_range
        refused |= {
            "normalize_advantages": (
                not args.normalize_advantages,
                "divides the score by its spread, and not the KL: set False",
            ),
            "reward_clip_range": (
                limits is None or (len(limits) == 2 and limits[0] < limits[1]),
                "must be two numbers, the lower one first",
            ),
        }
    else:
        refused |= {
            "loss_type": (
                args.loss_type in ("dapo", "bnpo", "dr_grpo"),
                "weighs the tokens of one response otherwise than those of another, or clips in "
                "a way that is not this KL's: use dapo, bnpo or dr_grpo",
            ),
            "importance_sampling_level": (
                args.importance_sampling_level == "token",
                "gives all tokens of a response the KL that follows any of them: set token",
            ),
            "top_entropy_quantile": (
                args.top_entropy_quantile == 1,
                "leaves the KL of most tokens out: set 1.0",
            ),
            "off_policy_mask_threshold": (
                args.off_policy_mask_threshold is None,
                "leaves the KL of some responses out: leave it None",
            ),
            "delta": (
                args.delta is None or args.delta > 1,
                "clips the ratio of every token, which begins at 1: give more, or None",
            ),
        }
    for name, (fine, reason) in refused.items():
        if not fine:
            raise ValueError(f"{name} is {getattr(args, name)!r}: it {reason}")
    check_intervals(args)
    check_training(args)
    check_numbers(args)
    check_fp16(args)
    check_processes(args)


@torch.no_grad()
def check_deterministic(model: nn.Module) -> None:
    """Refuses dropout that is left when that of modules is switched off; keeps the model's mode.

    Raises:
        ValueError: two passes in training differ.
    """
    trunk, mode = trunk_of(model), model.training
    ids = torch.zeros(1, 4, dtype=torch.long, device=trunk.device)
    model.train()
    first, second = (trunk(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2))
    model.train(mode)
    if not torch.equal(first, second):
        raise ValueError(
            "model has dropout that is no module of its own and stays on in training, so that "
            "policy and reference are never the same function: set its config's dropout fields "
            "(attention_dropout, ...) to 0 before it is loaded"
        )
