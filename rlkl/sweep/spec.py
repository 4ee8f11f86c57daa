"""A sweep: which recipe or algorithms, which settings vary, and how the runs are measured.

`rlkl.sweep.spec_file` reads one from its YAML.
"""

import itertools
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from rlkl.sweep.fields import Above, AtLeast

EVALUATED_FIELDS = (
    "model_name_or_path",
    "ref_model_name_or_path",
    "reward_model",
    "positive_label",
    "reward_score",
    "reward_clamp",
    "judge_model",
    "eval_prompts",
    "response_length",
    "temperature",
    "max_prompt_length",
)
"""Settings of a recipe that define what is measured: one value for all the cells of a sweep."""

OWN_FIELDS = ("output_dir", "seed", "wandb_group", "wandb_run_id", "wandb_arm")
OWN_FIELDS += ("keep_checkpoints", "config", "json")
"""Settings that the sweep itself gives to a cell."""

STRENGTH = "kl_coef"
"""The field along which one estimator's points make a curve; the others tell estimators apart."""

ALGORITHM = "algorithm"
"""The field that names one of rlkl's own trainers, for a sweep or for an arm of it."""


@dataclass(frozen=True)
class EvaluationSpec:
    """The one evaluator of all cells: same prompts, same draws, same reward model and judge."""

    prompts: Annotated[int, AtLeast(2)] = 128
    """Held-out prompts: the first of the recipe's ``eval_prompts``, all where it has fewer."""
    responses_per_prompt: Annotated[int, AtLeast(1)] = 4
    """Standard errors are clustered by prompt."""
    reference_samples: Annotated[int, AtLeast(0)] = 256
    """Samples of the reference for each prompt, behind the optimum and best-of-n; 0 for neither."""
    seed: Annotated[int, AtLeast(0)] = 0
    checkpoints: bool = False
    """Measure every checkpoint too (``save_steps``): several points from each run."""
    samples: Annotated[int, AtLeast(0)] = 3
    """Texts kept of each point."""
    script: str | None = None
    """Another evaluator (see `rlkl.sweep.cell` for what is asked of it); None: rlkl's."""


@dataclass(frozen=True)
class SearchSpec:
    """Settings that an Optuna sampler chooses, instead of a grid's fixed values."""

    fields: dict[str, dict[str, Any]]
    """Each ``{low, high, log}``."""
    configurations: Annotated[int, AtLeast(1)]
    """How many are tried in all, in turns over the points of the grid."""
    sampler: str = "tpe"
    """tpe, nsgaii or random; objectives: least KL, most reward."""
    seed: Annotated[int, AtLeast(0)] = 0


@dataclass(frozen=True)
class Configuration:
    """One choice of settings; its seeds are replicas of it."""

    number: int
    arm: str
    """What is compared: the settings that vary, without the strength of the KL."""
    label: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class SweepSpec:
    """A sweep: base recipe, what varies, replicas, evaluator, and bounds on failure."""

    name: str
    recipe: str | None = None
    """Path of a script; what is asked of it stands in `rlkl.sweep.cell`. None: rlkl's commands."""
    algorithm: str | None = None
    """In place of a recipe, one of `rlkl.sweep.algorithms`; a grid may set it for each arm."""
    config: str | None = None
    """YAML of base settings for the recipe; None for an algorithm: those of its command."""
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Base settings by algorithm, below `settings`: those of `config`, or of its command's YAML."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of every cell, over those of `config`."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Axis -> values; a value that is a mapping sets several fields at once."""
    search: SearchSpec | None = None
    seeds: list[Annotated[int, AtLeast(0)]] = field(default_factory=lambda: [0])
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    retries: Annotated[int, AtLeast(0)] = 2
    """How often a cell that failed is tried again."""
    lost_retries: Annotated[int, AtLeast(0)] = 20
    """How often a cell whose worker vanished is taken over."""
    heartbeat: Annotated[float, Above(0)] = 5.0
    """Seconds between a worker's signs of life."""
    grace: Annotated[float, Above(0)] = 30.0
    """Seconds of silence after which another worker takes the cell over."""
    minutes_per_cell: Annotated[float, Above(0)] | None = None
    """For the estimate of the time before any cell has ended."""

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The points of the grid: every combination of its axes, as settings."""
        points = []
        for values in itertools.product(*self.grid.values()):
            point: dict[str, Any] = {}
            for axis, value in zip(self.grid, values, strict=True):
                point |= value if isinstance(value, Mapping) else {axis: value}
            points.append(point)
        return points

    @property
    def num_configurations(self) -> int:
        """How many configurations there will be in all."""
        return self.search.configurations if self.search else len(self.arms)

    @property
    def num_cells(self) -> int:
        """Runs in all, without the measurement of the reference."""
        return self.num_configurations * len(self.seeds)

    def configuration(self, number: int, searched: Mapping[str, Any] | None = None):
        """The configuration of that number; `searched` are the values a sampler chose."""
        point = self.arms[number % len(self.arms)] | dict(searched or {})
        chosen = self.search.fields if self.search else {}
        along = dict.fromkeys([STRENGTH, *chosen])
        label = " ".join([self.arm_name(point), *_assignments(point, along, chosen)])
        return Configuration(number, self.arm_name(point), label, self.settings_of(point))

    def algorithm_of(self, point: Mapping[str, Any]) -> str | None:
        """What trains a grid point; None where it is the recipe's own affair."""
        return point.get(ALGORITHM, self.algorithm) if self.recipe is None else None

    def settings_of(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of a grid point: over the algorithm's defaults the sweep's, then its own."""
        algorithm = self.algorithm_of(point)
        named = {} if algorithm is None else {ALGORITHM: algorithm}
        return {**named, **self.defaults.get(str(algorithm), {}), **self.settings, **point}

    def arm_name(self, point: Mapping[str, Any]) -> str:
        """The shortest name that tells a grid point's estimator apart: rb, or rb/both lr=0.001.

        Where algorithms are compared, theirs comes first: ppo rb, rloo.
        """
        algorithm = self.algorithm_of(point)
        alike = [arm for arm in self.arms if self.algorithm_of(arm) == algorithm]
        name = self._name_among([self.settings_of(arm) for arm in alike], self.settings_of(point))
        if algorithm is not None and (len(alike) < len(self.arms) or not name):
            return f"{algorithm} {name}".strip()
        return name or self.name

    def _name_among(self, arms: Sequence[Mapping[str, Any]], point: Mapping[str, Any]) -> str:
        """What tells a grid point apart from these; nothing where nothing does."""
        searched = self.search.fields if self.search else {}
        varying = [
            name
            for name in dict.fromkeys(name for arm in arms for name in arm)
            if name not in (STRENGTH, "allow_biased_kl", *searched)
            and len({json.dumps(arm.get(name), sort_keys=True) for arm in arms}) > 1
        ]
        different = {tuple(json.dumps(arm.get(n)) for n in varying) for arm in arms}
        estimators = {arm.get("kl_estimator") for arm in arms}
        if len(estimators) == len(different) and point.get("kl_estimator") is not None:
            return str(point["kl_estimator"])
        plain = [n for n in ("kl_estimator", "kl_placement") if n in varying]
        rest = _assignments(point, [n for n in varying if n not in plain])
        return " ".join(["/".join(str(point.get(n)) for n in plain), *rest]).strip()

    def to_json(self) -> str:
        """As text, for the storage."""
        return json.dumps(asdict(self))  # the order of the axes is that of the cells

    @staticmethod
    def from_json(text: str) -> "SweepSpec":
        """The spec that `to_json` wrote."""
        data = json.loads(text)
        search = data.pop("search")
        return SweepSpec(
            search=SearchSpec(**search) if search else None,
            evaluation=EvaluationSpec(**data.pop("evaluation")),
            **data,
        )


def _assignments(
    point: Mapping[str, Any], names: Iterable[str], chosen: Container[str] = ()
) -> list[str]:
    """``name=value`` of those that are set; numbers with four digits where they have no more, or a
    sampler has chosen them.
    """

    def said(name: str, value: Any) -> str:
        short = f"{value:.4g}" if isinstance(value, float) else str(value)
        exact = not isinstance(value, float) or float(short) == value
        return short if exact or name in chosen else str(value)

    return [f"{name}={said(name, point[name])}" for name in names if name in point]


def iterate_cells(spec: SweepSpec) -> Iterator[tuple[Configuration, int]]:
    """Configuration and seed of every cell of a grid, in the order in which they are run.

    One seed of every configuration comes before the second of any, so that a sweep that is looked
    at early shows whole curves.
    """
    for seed in spec.seeds:
        for number in range(spec.num_configurations):
            yield spec.configuration(number), seed
