"""The configurations of a sweep as the trials of an Optuna study: least KL, most reward."""

import json
from collections import defaultdict
from contextlib import suppress
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import NullPool

from rlkl.sweep.ledger import Cell, Ledger
from rlkl.sweep.spec import SearchSpec
from rlkl.sweep.storage import engine_of


class ConfigurationStudy:
    """Asks for configurations and tells what became of them.

    A trial is a configuration; its seeds are cells of the ledger. Its two values are the means over
    them; where `rlkl sweep retry` has measured more of them since, another trial of the same
    settings has the new means, for Optuna's finished trials cannot be changed. The study says which
    configurations there are; which cell is run by whom is the ledger's.
    Every method may be called by several processes, and again after one was killed in it.
    """

    def __init__(self, ledger: Ledger) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.ledger, self.spec = ledger, ledger.spec
        self._told: dict[int, list[str]] = {}
        url = engine_of(ledger.url).url
        options: dict[str, Any] = {"poolclass": NullPool}
        if url.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": 120}
        storage = optuna.storages.RDBStorage(
            url.render_as_string(hide_password=False), engine_kwargs=options
        )
        self.study = optuna.create_study(
            storage=storage,
            study_name=ledger.name,
            directions=["minimize", "maximize"],
            load_if_exists=True,
            sampler=_sampler(self.spec.search, 0),
        )

    def settle(self) -> None:
        """Tells the study of configurations whose seeds have all ended; adds those that are due."""
        cells = [c for c in self.ledger.cells(records=False) if c.configuration >= 0]
        by_number: dict[int, list[Cell]] = defaultdict(list)
        for cell in cells:
            by_number[cell.configuration].append(cell)
        for number, own in by_number.items():
            states = [cell.state for cell in own]
            ended = all(state in ("done", "failed") for state in states)
            if ended and self._told.get(number) != states and self._tell(own):
                self._told[number] = states
        missing = [n for n in range(self.spec.num_configurations) if n not in by_number]
        idle = not any(cell.state == "waiting" for cell in cells)
        if missing and (self.spec.search is None or idle):
            with self.ledger.proposing() as alone:
                if alone:
                    for number in missing[: 1 if self.spec.search else None]:
                        self._propose(number)

    def _propose(self, number: int) -> None:
        """Asks the sampler for configuration `number` and adds its cells."""
        arm = self.spec.arms[number % len(self.spec.arms)]
        fixed = {name: _choice(value) for name, value in arm.items()}
        self.study.enqueue_trial(fixed)
        self.study.sampler = _sampler(self.spec.search, number)
        trial = self.study.ask(self._distributions())
        if any(trial.params[name] != value for name, value in fixed.items()):
            self.study.tell(trial, state=TrialState.FAIL)  # left by a process that was killed here
            return
        searched = {name: trial.params[name] for name in self._searched()}
        configuration = self.spec.configuration(number, searched)
        trial.set_user_attr("configuration", number)
        trial.set_user_attr("label", configuration.label)
        if not self.ledger.add_configuration(configuration, trial.number):
            self.study.tell(trial, state=TrialState.FAIL)

    def _tell(self, cells: list[Cell]) -> bool:
        """Whether the study knows the means of these cells now."""
        number = cells[0].trial
        records = [self.ledger.cell(cell.key).record for cell in cells if cell.state == "done"]
        ends = [record["points"][-1] for record in records if record]
        state = TrialState.COMPLETE if ends else TrialState.FAIL
        values = None
        if ends:
            values = [float(np.mean([end[name] for end in ends])) for name in ("kl", "reward")]
        with suppress(UpdateFinishedTrialError):  # another worker was first, with the same values
            self.study.tell(number, values, state=state, skip_if_finished=True)
        return values is None or self._tell_again(number, values)

    def _tell_again(self, number: int, values: list[float]) -> bool:
        """Adds a trial like `number` with these values, unless one of them has them already."""

        def known() -> bool:
            trials = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            same = [t for t in trials if t.number == number or t.user_attrs.get("of") == number]
            return any(np.allclose(trial.values, values, rtol=1e-12, atol=0) for trial in same)

        if known():
            return True
        with self.ledger.proposing() as alone:
            if alone and not known():
                first = self.study.get_trials(deepcopy=False)[number]
                again = optuna.trial.create_trial(
                    values=values,
                    params=first.params,
                    distributions=first.distributions,
                    user_attrs=first.user_attrs | {"of": number},
                )
                self.study.add_trial(again)
        return alone

    def _searched(self) -> dict[str, dict[str, Any]]:
        return self.spec.search.fields if self.spec.search else {}

    def _distributions(self) -> dict[str, BaseDistribution]:
        names = dict.fromkeys(name for arm in self.spec.arms for name in arm)
        choices = {
            name: list(dict.fromkeys(_choice(arm[name]) for arm in self.spec.arms if name in arm))
            for name in names
        }
        grid = {name: CategoricalDistribution(values) for name, values in choices.items()}
        return grid | {name: _range(limits) for name, limits in self._searched().items()}


def _choice(value: Any) -> Any:
    """A value as Optuna stores it."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _range(limits: dict[str, Any]) -> BaseDistribution:
    whole = all(isinstance(limits[end], int) for end in ("low", "high"))
    kind = IntDistribution if whole else FloatDistribution
    return kind(limits["low"], limits["high"], log=bool(limits.get("log", False)))


def _sampler(search: SearchSpec | None, number: int) -> optuna.samplers.BaseSampler:
    """Random numbers belong to a configuration: no two processes may draw the same ones for two."""
    entropy = [search.seed if search else 0, number]
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    kind = search.sampler if search else "random"
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=6, constant_liar=True)
    if kind == "nsgaii":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)
