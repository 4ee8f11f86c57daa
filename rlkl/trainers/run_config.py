"""What every trainer's settings share: precision, logging, and the W&B run."""

import math
from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 in hardware: an accelerator, or a CPU's AMX or
    AVX-512 (Cooper Lake, Zen 4).
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


_IDLE = {
    "neftune_noise_alpha": (
        "models are trained in eval mode here (without dropout), in which no noise is added; leave "
        "it out"
    ),
    "label_smoothing_factor": "it is for losses of transformers' own; leave it out",
}
"""Settings that would do nothing, and why."""


def choose_precision(args: TrainingArguments) -> None:
    """Sets bf16, if it is None, where the hardware is fast at it; and the CPU, where it is used.

    To be called before TrainingArguments' own checks, which refuse bf16 on a CPU that was not asked
    for.
    """
    if args.bf16 is None:
        args.bf16 = not args.fp16 and bf16_is_fast()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Tokens are drawn in float64, which Apple's GPUs have not.
    if accelerator is None or accelerator.type == "mps":
        args.use_cpu = True


def check_fp16(args: TrainingArguments) -> None:
    """Refuses fp16 where nothing would follow it.

    Raises:
        ValueError: on a CPU, on which accelerate has no fp16 and trains on in float32.
    """
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 has no effect on a CPU: leave it out, or set bf16")


_MAY_BE_INFINITE = frozenset(
    {
        "max_grad_norm",
        "cliprange",
        "cliprange_value",
        "kl_weight_bound",
        "epsilon",
        "epsilon_high",
        "delta",
        "reward_clip_range",
        "vllm_importance_sampling_clip_max",
    }
)
"""Bounds, of which infinity says that there is none."""


def check_intervals(args: TrainingArguments) -> None:
    """Refuses numbers of steps after which nothing is logged, evaluated or saved, or only at the
    end.

    To be called before TrainingArguments' own checks, which an infinite number breaks.

    Raises:
        ValueError: names the setting, and how to say that it is not to be done at all.
    """
    for name, strategy, asked in (
        ("logging_steps", "logging_strategy", args.logging_strategy),
        ("eval_steps", "eval_strategy", args.eval_strategy),
        ("save_steps", "save_strategy", args.save_strategy),
    ):
        steps = getattr(args, name)
        if asked == "steps" and steps is not None and not 0 < steps < math.inf:
            raise ValueError(
                f"{name} is {steps:g}; give the steps from one to the next, or their share of all "
                f"steps, below 1 ({strategy} no is for none)"
            )


def check_numbers(settings: object) -> None:
    """Refuses settings that are no number (nan), or infinite where that is not "no bound".

    Args:
        settings: any dataclass.

    Raises:
        ValueError: names the setting.

    >>> check_numbers(WandbArguments(wandb_group="mine"))
    """
    for name in (setting.name for setting in fields(settings)):  # pyright: ignore[reportArgumentType]
        value = getattr(settings, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, float) or math.isfinite(number):
                continue
            if math.isnan(number) or name not in _MAY_BE_INFINITE:
                raise ValueError(f"{name} is {value}; give a finite number")


def check_training(args: TrainingArguments) -> None:
    """Refuses numbers that no step can be taken with, or that would be passed over in silence.

    Raises:
        ValueError: names the setting.
    """
    for name in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "eval_accumulation_steps",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name in ("learning_rate", "weight_decay", "adam_epsilon"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be finite and >= 0")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must lie in [0, 1)")
    if not math.isfinite(args.num_train_epochs):
        raise ValueError(f"num_train_epochs is {args.num_train_epochs}; it must be finite")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            f"max_steps is {args.max_steps} and num_train_epochs {args.num_train_epochs}: "
            "nothing would be trained; make one of them positive (max_steps -1 leaves it to "
            "num_train_epochs)"
        )
    if args.max_grad_norm is None or not args.max_grad_norm >= 0:
        raise ValueError(f"max_grad_norm is {args.max_grad_norm}; 0 does not clip")
    if args.dataloader_num_workers < 0:
        raise ValueError(
            f"dataloader_num_workers is {args.dataloader_num_workers}; 0 reads in this process"
        )


@dataclass
class WandbArguments:
    """How the W&B run of a training is called and found; see `rlkl.trainers.tracking.wandb_run`."""

    wandb_project: str = field(default="rlkl", metadata={"help": "W&B project."})
    wandb_group: str | None = field(
        default=None, metadata={"help": "W&B group; None: what is trained (estimator or loss)."}
    )
    wandb_run_id: str | None = field(
        default=None,
        metadata={"help": "W&B id; None: a new one, kept in output_dir over resumes."},
    )
    wandb_tags: list[str] = field(default_factory=list, metadata={"help": "Further W&B tags."})
    wandb_arm: str | None = field(
        default=None,
        metadata={"help": "What is compared, in the W&B config: a sweep's runs of one arm."},
    )


@dataclass
class RunArguments(WandbArguments, TrainingArguments):
    """transformers.TrainingArguments with defaults for batches of texts, and the W&B run's name.

    ``report_to`` keeps transformers' default "none": logs are files in ``output_dir``, and nothing
    is sent anywhere. "wandb" adds a W&B run, offline without a key.
    """

    # Defaults of TrainingArguments that differ.
    logging_steps: float = field(default=1, metadata={"help": "Steps between logs."})
    bf16: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "bf16 autocast of the trunks; None: where the hardware multiplies bf16."},
    )
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Batches are lists of texts: nothing to pin."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The text columns are needed."}
    )

    def __post_init__(self) -> None:
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0  # transformers' loop compares it, and 0 does not clip
        choose_precision(self)
        self._check_effect()
        check_intervals(self)
        super().__post_init__()
        check_training(self)

    def _check_effect(self) -> None:
        for name, why in _IDLE.items():
            if getattr(self, name):
                raise ValueError(f"{name} has no effect: {why}")

    @property
    def gemm_dtype(self) -> torch.dtype | None:
        """Precision of the factors in the heads' products: that of the trunks, on a CPU.

        Logits and sums are float32 either way.
        """
        return torch.bfloat16 if self.bf16 and self.device.type == "cpu" else None
