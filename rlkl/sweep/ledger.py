"""The cells of a sweep in a database: who runs which, what became of it, and every attempt.

One row is one cell, so that a cell cannot be lost or doubled. Who takes it is decided by a single
UPDATE that names the attempt it has seen: of two workers one finds no row left. An attempt number
is the lease: a worker that was silent for longer than `grace` has lost it, and whatever it writes
later names an attempt that is no longer the row's.

The tables stand in the same database as the Optuna study (SQLite or PostgreSQL). They do not use
Optuna's own queue because its claim reads the state of a trial and then writes it, which SQLite
lets two processes do at once (optuna 5.0, ``RDBStorage.set_trial_state_values``), and because its
retry of a stale trial is two transactions, between which a killed process loses the trial.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.schema import CreateTable

from rlkl.sweep.spec import EVALUATED_FIELDS, Configuration, SweepSpec
from rlkl.sweep.storage import engine_of, shown, without_password

METADATA = sa.MetaData()
SWEEPS = sa.Table(
    "rlkl_sweeps",
    METADATA,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("identity", sa.String(32), nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("proposing_until", sa.Double, nullable=False),
)
CELLS = sa.Table(
    "rlkl_cells",
    METADATA,
    sa.Column("sweep", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(100), primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("configuration", sa.Integer, nullable=False),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("arm", sa.Text, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("seed", sa.Integer, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("losses", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(200)),
    sa.Column("heartbeat", sa.Double),
    sa.Column("progress", sa.Double, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("record", sa.Text),
    sa.Column("error", sa.Text),
)
ATTEMPTS = sa.Table(
    "rlkl_attempts",
    METADATA,
    sa.Column("sweep", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(100), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("worker", sa.String(200), nullable=False),
    sa.Column("started", sa.Double, nullable=False),
    sa.Column("ended", sa.Double),
    sa.Column("outcome", sa.String(20), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)
REFERENCE = "reference"
"""Key of the cell that measures the reference: optimum and best-of-n. It belongs to no
configuration (number −1)."""


@dataclass(frozen=True)
class Cell:
    """A row of the ledger."""

    key: str
    configuration: int
    trial: int
    arm: str
    label: str
    seed: int
    settings: dict[str, Any]
    state: str
    """waiting, running, done or failed."""
    attempt: int
    failures: int
    worker: str | None
    silent: float
    """Seconds since the last heartbeat."""
    progress: float
    """Share done, by the steps that the run has logged."""
    seconds: float
    """Working time of all its attempts."""
    record: dict[str, Any] | None
    error: str | None


class Ledger:
    """The cells of one sweep.

    Args:
        url: SQLAlchemy's address of the database.
        name: of the sweep; None where the database holds just one.

    Raises:
        ValueError: no such sweep, or several and none named.
    """

    def __init__(self, url: str, name: str | None = None) -> None:
        self.url, self.engine = url, engine_of(url)
        names = sweep_names(self.engine)
        if name is None and not names:
            raise ValueError(f"{shown(url)} holds no sweep; `rlkl sweep run` begins one")
        if name is None and len(names) != 1:
            raise ValueError(f"{shown(url)} holds the sweeps {names}; choose one by --name")
        self.name = name if name is not None else names[0]
        if self.name not in names:
            raise ValueError(f"{shown(url)} holds no sweep {self.name!r}; it holds {names}")
        with self.engine.connect() as db:
            row = db.execute(sa.select(SWEEPS).where(SWEEPS.c.name == self.name)).one()
        self.identity, self.spec = str(row.identity), SweepSpec.from_json(row.spec)
        self.mine = CELLS.c.sweep == self.name

    # ---- clock: the database's, so that machines need not agree on the time ----------------------

    @property
    def _now(self) -> sa.ColumnElement[float]:
        if self.engine.dialect.name == "sqlite":
            return sa.literal_column("(julianday('now') - 2440587.5) * 86400.0", sa.Double)
        return sa.literal_column("extract(epoch from clock_timestamp())::double precision")

    # ---- filling ---------------------------------------------------------------------------------

    def add_configuration(self, configuration: Configuration, trial: int) -> bool:
        """Adds all replicas of a configuration at once; False where they are there already."""
        rows = [
            self._row(configuration, seed, trial, index * 1_000_000 + configuration.number)
            for index, seed in enumerate(self.spec.seeds)
        ]
        return self._insert(rows)

    def add_reference(self) -> bool:
        """Adds the measurement of the reference, which comes first."""
        none = Configuration(-1, REFERENCE, REFERENCE, self.spec.settings)
        return self._insert([self._row(none, self.spec.evaluation.seed, -1, -1, REFERENCE)])

    def _row(
        self, configuration: Configuration, seed: int, trial: int, position: int, key: str = ""
    ) -> dict[str, Any]:
        return {
            "sweep": self.name,
            "key": key or f"{configuration.number:03d}-seed{seed}",
            "position": position,
            "configuration": configuration.number,
            "trial": trial,
            "arm": configuration.arm,
            "label": configuration.label,
            "seed": seed,
            "settings": json.dumps(configuration.settings),
            "state": "waiting",
            "attempt": 0,
            "failures": 0,
            "losses": 0,
            "progress": 0.0,
            "seconds": 0.0,
        }

    def _insert(self, rows: list[dict[str, Any]]) -> bool:
        try:
            with self.engine.begin() as db:
                db.execute(sa.insert(CELLS), rows)
        except exc.IntegrityError:  # the primary key: somebody was first
            return False
        return True

    # ---- taking and ending -----------------------------------------------------------------------

    def claim(self, worker: str) -> Cell | None:
        """Takes the next cell that waits, or that a silent worker has left; None where there is
        none.
        """
        stale = (CELLS.c.state == "running") & (CELLS.c.heartbeat < self._now - self.spec.grace)
        free = (CELLS.c.state == "waiting") | stale
        while True:
            with self.engine.begin() as db:
                query = sa.select(CELLS).where(self.mine, free).order_by(CELLS.c.position).limit(1)
                row = db.execute(query).first()
                if row is None:
                    return None
                lost = row.state == "running"
                given_up = lost and row.losses >= self.spec.lost_retries
                taken = db.execute(
                    sa.update(CELLS)
                    .where(self.mine, CELLS.c.key == row.key, CELLS.c.attempt == row.attempt, free)
                    .values(
                        state="failed" if given_up else "running",
                        attempt=row.attempt + (not given_up),
                        losses=row.losses + lost,
                        worker=worker,
                        heartbeat=self._now,
                        error=f"its worker vanished {row.losses + 1} times" if given_up else None,
                    )
                )
                if taken.rowcount == 0:
                    continue
                if lost:
                    self._close_attempt(db, row.key, row.attempt, "lost", "no sign of life")
                if given_up:
                    continue
                db.execute(
                    sa.insert(ATTEMPTS).values(
                        sweep=self.name,
                        key=row.key,
                        number=row.attempt + 1,
                        worker=worker,
                        started=self._now,
                        outcome="running",
                        note="",
                    )
                )
            return self.cell(row.key)

    def heartbeat(self, cell: Cell, progress: float) -> bool:
        """A sign of life; False where the cell has been taken over by another worker."""
        with self.engine.begin() as db:
            return self._own(db, cell, heartbeat=self._now, progress=progress)

    def finish(self, cell: Cell, record: dict[str, Any]) -> bool:
        """Ends a cell with its record; False, and nothing written, where the lease was lost."""
        values = {"state": "done", "record": json.dumps(record), "progress": 1.0, "error": None}
        return self._end(cell, "done", "", **values)

    def fail(self, cell: Cell, note: str) -> bool:
        """Ends an attempt that failed: the cell waits again, or has failed for good."""
        again = cell.failures < self.spec.retries
        state = "waiting" if again else "failed"
        return self._end(cell, "failed", note, state=state, failures=cell.failures + 1, error=note)

    def release(self, cell: Cell) -> bool:
        """Ends an attempt that was told to stop: the cell waits for the next worker."""
        return self._end(cell, "stopped", "", state="waiting")

    def retry(self) -> int:
        """Queues the failed cells again, with all their retries; how many they are."""
        with self.engine.begin() as db:
            changed = db.execute(
                sa.update(CELLS)
                .where(self.mine, CELLS.c.state == "failed")
                .values(state="waiting", failures=0, losses=0, error=None)
            )
            return changed.rowcount

    def _own(self, db: sa.Connection, cell: Cell, **values: Any) -> bool:
        """Changes a cell's row if this attempt still holds it."""
        held = (CELLS.c.state == "running") & (CELLS.c.attempt == cell.attempt)
        changed = db.execute(
            sa.update(CELLS).where(self.mine, CELLS.c.key == cell.key, held).values(**values)
        )
        return changed.rowcount == 1

    def _end(self, cell: Cell, outcome: str, note: str, **values: Any) -> bool:
        with self.engine.begin() as db:
            started = sa.select(ATTEMPTS.c.started).where(
                ATTEMPTS.c.sweep == self.name,
                ATTEMPTS.c.key == cell.key,
                ATTEMPTS.c.number == cell.attempt,
            )
            seconds = CELLS.c.seconds + self._now - started.scalar_subquery()
            if not self._own(db, cell, seconds=seconds, worker=None, **values):
                return False
            self._close_attempt(db, cell.key, cell.attempt, outcome, note)
        return True

    def _close_attempt(
        self, db: sa.Connection, key: str, number: int, outcome: str, note: str
    ) -> None:
        same = (ATTEMPTS.c.sweep == self.name) & (ATTEMPTS.c.key == key)
        db.execute(
            sa.update(ATTEMPTS)
            .where(same, ATTEMPTS.c.number == number)
            .values(outcome=outcome, note=note, ended=self._now)
        )

    # ---- reading ---------------------------------------------------------------------------------

    def cell(self, key: str) -> Cell:
        """The row of one cell."""
        with self.engine.connect() as db:
            row = db.execute(self._rows().where(CELLS.c.key == key)).one()
        return _cell(row)

    def cells(self, records: bool = True) -> list[Cell]:
        """All rows, in the order in which they are run; without `records` quicker."""
        with self.engine.connect() as db:
            return [_cell(row) for row in db.execute(self._rows(records))]

    def _rows(self, records: bool = True) -> sa.Select:
        columns = [c for c in CELLS.c if records or c.name != "record"]
        silent = (self._now - CELLS.c.heartbeat).label("silent")
        return sa.select(*columns, silent).where(self.mine).order_by(CELLS.c.position)

    def attempts(self) -> list[dict[str, Any]]:
        """The journal: every attempt at every cell, in the order in which they began."""
        query = sa.select(ATTEMPTS).where(ATTEMPTS.c.sweep == self.name)
        with self.engine.connect() as db:
            rows = db.execute(query.order_by(ATTEMPTS.c.started)).mappings()
            return [{k: v for k, v in row.items() if k != "sweep"} for row in rows]

    @contextmanager
    def proposing(self) -> Iterator[bool]:
        """Whether this process alone may ask the sampler for configurations, inside the block.

        A process that dies inside it holds the others up for `grace` seconds.
        """
        mine = SWEEPS.c.name == self.name
        with self.engine.begin() as db:
            free = SWEEPS.c.proposing_until < self._now
            until = self._now + self.spec.grace
            taken = db.execute(
                sa.update(SWEEPS).where(mine, free).values(proposing_until=until)
            ).rowcount
        yield taken == 1
        if taken == 1:
            with self.engine.begin() as db:
                db.execute(sa.update(SWEEPS).where(mine).values(proposing_until=0.0))


def _cell(row: Any) -> Cell:
    values = dict(row._mapping)
    record = values.get("record")
    return Cell(
        **{
            name: values[name]
            for name in Cell.__dataclass_fields__
            if name not in ("settings", "record", "silent")
        },
        settings=json.loads(values["settings"]),
        record=json.loads(record) if record else None,
        silent=float(values["silent"] or 0.0),
    )


def sweep_names(engine: sa.Engine) -> list[str]:
    """The sweeps that a database holds.

    Raises:
        ValueError: the database cannot be reached.
    """
    try:
        if not sa.inspect(engine).has_table(SWEEPS.name):
            return []
    except exc.DatabaseError as error:
        raise ValueError(f"cannot open {without_password(engine.url)}: {error.orig}") from error
    with engine.connect() as db:
        return list(db.execute(sa.select(SWEEPS.c.name).order_by(SWEEPS.c.name)).scalars())


def open_ledger(url: str, spec: SweepSpec, identity: str) -> Ledger:
    """The ledger of a sweep, begun if it is not there yet.

    Raises:
        ValueError: the database holds another sweep under this name.
    """
    engine = engine_of(url)
    sweep_names(engine)  # whether it can be reached
    try:
        with engine.begin() as db:
            for table in METADATA.sorted_tables:
                db.execute(CreateTable(table, if_not_exists=True))
        with engine.begin() as db:
            row = {"name": spec.name, "identity": identity, "spec": spec.to_json()}
            db.execute(sa.insert(SWEEPS).values(**row, proposing_until=0.0))
    except exc.IntegrityError:  # the primary key: it is there
        pass
    except exc.DatabaseError as error:
        raise ValueError(f"cannot write to {without_password(engine.url)}: {error.orig}") from error
    ledger = Ledger(url, spec.name)
    _same_sweep(ledger.spec, spec, url)
    return ledger


def _same_sweep(stored: SweepSpec, given: SweepSpec, url: str) -> None:
    before, now = json.loads(stored.to_json()), json.loads(given.to_json())
    for name in EVALUATED_FIELDS:  # what a sweep stored later than it began was null
        if name in now["settings"]:
            before["settings"].setdefault(name, None)
    # What `config` says stands in the settings; minutes_per_cell is but a guess.
    for name in before:
        if name not in ("config", "minutes_per_cell") and before[name] != now[name]:
            raise ValueError(
                f"{shown(url)} holds a sweep {given.name!r} with other {name}: give the new one "
                "another name, or another --storage"
            )
