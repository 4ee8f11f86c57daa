"""The settings of distillation, on top of transformers.TrainingArguments."""

import math
from dataclasses import dataclass, field

from rlkl.kl import DIVERGENCES, Divergence, get_divergence
from rlkl.trainers.run_config import RunArguments, check_fp16, check_numbers


@dataclass
class DistillConfig(RunArguments):
    """Settings of :class:`rlkl.trainers.DistillTrainer`; names are TRL's where TRL has one."""

    loss: str = field(
        default="akl", metadata={"help": f"Divergence to minimise: {', '.join(DIVERGENCES)}."}
    )
    ce_weight: float = field(
        default=0.0,
        metadata={"help": "c in (1 − c) T² divergence + c cross-entropy; given text only."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "T: divides both models' logits in the loss, which is multiplied by T²."},
    )
    fkl_weight: float = field(default=0.5, metadata={"help": "fkl_rkl: weight of the forward KL."})
    js_weight: float = field(
        default=0.5, metadata={"help": "js: the teacher's share of the mixture."}
    )
    js_scaled: bool = field(
        default=False,
        metadata={"help": "js: divided by w(1 − w); its ends are then fkl (0) and rkl (1)."},
    )
    skew_alpha: float = field(default=0.1, metadata={"help": "skew_fkl, skew_rkl: α."})
    head_mass: float = field(
        default=0.5, metadata={"help": "akl, akl_r: the teacher's probability that makes the head."}
    )
    head_rule: str = field(
        default="within",
        metadata={"help": "akl, akl_r: head within the mass (published code), or to reach it."},
    )
    on_policy_fraction: float = field(
        default=0.0,
        metadata={"help": "λ: share of the batches whose responses the student samples (GKD)."},
    )
    teacher_generated: bool = field(
        default=False, metadata={"help": "The other batches: sampled by the teacher, not given."}
    )
    on_policy_gradient: str = field(
        default="token",
        metadata={"help": "token; sequence adds how a token changes later ones (rkl only)."},
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Temperature at which student and teacher sample."}
    )
    response_length: int = field(
        default=128, metadata={"help": "Longest response in tokens; longer ones are cut."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt in tokens; longer ones lose their beginning."},
    )
    eval_on_policy: bool = field(
        default=False, metadata={"help": "Evaluations also measure the student's own samples."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between logs; every divergence is measured on these."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fp16(self)
        for name in ("temperature", "sampling_temperature", "response_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be > 0 and finite")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length is {self.max_prompt_length}; it must be >= 1")
        for name in ("ce_weight", "on_policy_fraction", "fkl_weight", "js_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 <= self.skew_alpha < 1:
            raise ValueError(f"skew_alpha is {self.skew_alpha}; it must lie in [0, 1)")
        if not 0 < self.head_mass <= 1:
            raise ValueError(f"head_mass is {self.head_mass}; it must lie in (0, 1]")
        if self.head_rule not in ("within", "reach"):
            raise ValueError(f"head_rule is {self.head_rule!r}; use 'within' or 'reach'")
        if self.on_policy_gradient not in ("token", "sequence"):
            raise ValueError(
                f"on_policy_gradient is {self.on_policy_gradient!r}; use 'token' or 'sequence'"
            )
        if self.on_policy_gradient == "sequence":
            self._check_sequence_gradient()
        self.divergence()
        check_numbers(self)

    def _check_sequence_gradient(self) -> None:
        if self.loss != "rkl":
            raise ValueError(
                f"on_policy_gradient 'sequence' with loss {self.loss!r}: the sequence-level "
                "gradient is that of D_KL(student ‖ teacher); use loss 'rkl', or 'token'"
            )
        if self.on_policy_fraction == 0:
            raise ValueError(
                "on_policy_gradient 'sequence' needs the student's samples: set "
                "on_policy_fraction > 0"
            )
        if self.temperature != self.sampling_temperature:
            raise ValueError(
                f"on_policy_gradient 'sequence' with temperature {self.temperature} and "
                f"sampling_temperature {self.sampling_temperature}: the KL is that of the "
                "distribution that sampled; make them equal"
            )

    @property
    def reads_answers(self) -> bool:
        """Whether any batch is of given completions or texts: not all responses are sampled."""
        return self.on_policy_fraction < 1 and not self.teacher_generated

    def divergence(self) -> Divergence:
        """The divergence that `loss` names, with those of its settings that stand here."""
        settings = {
            "fkl_rkl": {"weight": self.fkl_weight},
            "js": {"weight": self.js_weight, "scaled": self.js_scaled},
            "skew_fkl": {"alpha": self.skew_alpha},
            "skew_rkl": {"alpha": self.skew_alpha},
            "akl": {"head_mass": self.head_mass, "head_rule": self.head_rule},
            "akl_r": {"head_mass": self.head_mass, "head_rule": self.head_rule},
        }
        return get_divergence(self.loss, **settings.get(self.loss, {}))
