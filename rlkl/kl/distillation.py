"""The divergences that a student can be trained on, by name, each with what it may claim.

    name      value                                          takes
    fkl       D_KL(teacher ‖ student)
    rkl       D_KL(student ‖ teacher)
    fkl_rkl   w fkl + (1 - w) rkl                            weight = 0.5
    js        w D_KL(teacher ‖ m) + (1 - w) D_KL(student ‖ m)   weight = 0.5, scaled = False
    skew_fkl  D_KL(teacher ‖ α teacher + (1 - α) student)    alpha = 0.1
    skew_rkl  D_KL(student ‖ α student + (1 - α) teacher)    alpha = 0.1
    akl       adaptive: w fkl + (1 - w) rkl, w per position  head_mass = 0.5, head_rule = "within"
    akl_r     the same with the weights exchanged            head_mass, head_rule

Student is the policy and teacher the reference of `rlkl.kl.divergences`. All share their optimum,
the teacher; they differ in what they fit first, and in what they forgive.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from rlkl.kl.adaptive import adaptive_kl
from rlkl.kl.divergences import (
    forward_kl,
    forward_reverse_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)


@dataclass(frozen=True)
class DivergenceClaims:
    """What a divergence promises at its default settings; each field is tested, true or false."""

    direction: Literal["forward", "reverse", "neither"]
    """What costs more: teacher tokens that the student misses (forward), or tokens of the student
    that the teacher lacks (reverse)."""

    symmetric: bool
    """Exchanging student and teacher changes nothing."""

    finite_if_student_excludes: bool
    """Finite where the student gives no mass to tokens of the teacher."""

    finite_if_teacher_excludes: bool
    """Finite where the teacher gives no mass to tokens of the student."""


@dataclass(frozen=True)
class Divergence:
    """A divergence with its settings; call it on the logits of student and teacher.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> print(f"{get_divergence('js', weight=0.5)(student, teacher):.4f}")
        0.0338
    """

    name: str
    claims: DivergenceClaims
    function: Callable[..., Tensor] = field(repr=False)
    settings: Mapping[str, float | str | bool] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )

    def __call__(
        self,
        student_logits: Float[Tensor, "*batch V"],
        teacher_logits: Float[Tensor, "*batch V_ref"],
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, "*batch"]:
        """`[..., V]` logits -> `[...]` nats; differentiable in the student's logits only."""
        return self.function(
            student_logits, teacher_logits, temperature=temperature, **self.settings
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy.deepcopy, which have no way with read-only settings."""
        return _restored, (self.name, self.claims, self.function, dict(self.settings))

    def with_settings(self, **settings: float | str | bool) -> "Divergence":
        """The same divergence with other settings.

        Raises:
            ValueError: a setting that this divergence does not take.
        """
        unknown = sorted(set(settings) - set(self.takes))
        if unknown:
            known = ", ".join(self.takes) or "none"
            raise ValueError(f"{self.name} has no setting {unknown[0]!r}; it takes: {known}")
        return replace(self, settings=MappingProxyType({**self.settings, **settings}))

    @property
    def takes(self) -> list[str]:
        """Names of its settings."""
        fixed = {"policy_logits", "ref_logits", "temperature", "flipped"}
        return [name for name in signature(self.function).parameters if name not in fixed]


def _restored(
    name: str,
    claims: DivergenceClaims,
    function: Callable[..., Tensor],
    settings: dict[str, float | str | bool],
) -> Divergence:
    return Divergence(name, claims, function, MappingProxyType(settings))


def _claims(
    direction: Literal["forward", "reverse", "neither"],
    *,
    symmetric: bool = False,
    finite_if_student_excludes: bool = False,
    finite_if_teacher_excludes: bool = False,
) -> DivergenceClaims:
    return DivergenceClaims(
        direction, symmetric, finite_if_student_excludes, finite_if_teacher_excludes
    )


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        d.name: d
        for d in (
            Divergence("fkl", _claims("forward", finite_if_teacher_excludes=True), forward_kl),
            Divergence("rkl", _claims("reverse", finite_if_student_excludes=True), reverse_kl),
            Divergence("fkl_rkl", _claims("neither", symmetric=True), forward_reverse_kl),
            Divergence(
                "js",
                _claims(
                    "neither",
                    symmetric=True,
                    finite_if_student_excludes=True,
                    finite_if_teacher_excludes=True,
                ),
                jensen_shannon,
            ),
            Divergence(
                "skew_fkl",
                _claims(
                    "forward", finite_if_student_excludes=True, finite_if_teacher_excludes=True
                ),
                skew_kl,
            ),
            Divergence(
                "skew_rkl",
                _claims(
                    "reverse", finite_if_student_excludes=True, finite_if_teacher_excludes=True
                ),
                skew_reverse_kl,
            ),
            Divergence("akl", _claims("neither"), adaptive_kl),
            Divergence("akl_r", _claims("neither"), partial(adaptive_kl, flipped=True)),
        )
    }
)
"""Every divergence by its name, at its default settings."""


def get_divergence(name: str, **settings: float | str | bool) -> Divergence:
    """The divergence of that name, with settings.

    Raises:
        ValueError: no such divergence, or a setting that it does not take.

    Example:
        >>> get_divergence("skew_fkl", alpha=0.2).settings["alpha"]
        0.2
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence {name!r} is unknown; use one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name].with_settings(**settings)
