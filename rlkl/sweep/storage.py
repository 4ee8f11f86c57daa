"""Where a sweep is stored: the address of its database, opened, shown, and remembered.

A folder whose sweep is in another database than the folder's own keeps its address, so that
`rlkl sweep status` and the others find it; never a password.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import exc

REMEMBERED = "storage.json"
_SECRETS = ("password", "sslpassword")
"""Where else an address may have a password: among the parameters behind the question mark."""


def default_storage(folder: Path) -> str:
    """The sweep's own SQLite database."""
    return f"sqlite:///{folder.resolve() / 'sweep.db'}"


def engine_of(url: str) -> sa.Engine:
    """The database; SQLite's folder is made and its writers wait for one another.

    Connections are not kept: a worker needs one every few seconds, and none outlives a fork.

    Raises:
        ValueError: not an address, or its driver is not installed.
    """
    try:
        return _engine(url)
    except (exc.ArgumentError, exc.NoSuchModuleError) as error:
        raise ValueError(
            f"storage {shown(url)!r} is no address such as sqlite:///file.db or "
            "postgresql://user@host/name"
        ) from error
    except ModuleNotFoundError as error:
        raise ValueError(
            f"storage {shown(url)!r} needs {error.name}: pip install 'rlkl[postgres]'"
        ) from error


def _engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise exc.NoSuchModuleError
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ValueError(
                f"storage {url!r} ends with its process: name a file, sqlite:///file.db"
            )
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        return sa.create_engine(parsed, poolclass=sa.NullPool, connect_args={"timeout": 120})
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return sa.create_engine(parsed, poolclass=sa.NullPool)


def without_password(url: sa.URL) -> sa.URL:
    """An address as it may be shown and written down.

    >>> without_password(sa.make_url("postgresql://me:secret@host/db?password=too&sslmode=require"))
    postgresql://me@host/db?sslmode=require
    """
    bare = sa.URL.create(url.drivername, url.username, None, url.host, url.port, url.database)
    return bare.set(query=url.query).difference_update_query(_SECRETS)


def shown(storage: str) -> str:
    """An address for people, without its password; what is none, as it is.

    >>> shown("postgresql://me:secret@host/db")
    'postgresql://me@host/db'
    """
    try:
        return str(without_password(sa.make_url(storage)))
    except exc.ArgumentError:
        return storage


def remember(folder: Path, storage: str, name: str) -> None:
    """Writes the address of a sweep and its name into its folder, unless it is the folder's own.

    The password is left out: PostgreSQL's client takes it from ``PGPASSWORD`` or ``~/.pgpass``.
    """
    given = sa.make_url(storage)
    url = without_password(given)
    if url.get_backend_name() == "sqlite" and url.database is not None:
        url = url.set(database=str(Path(url.database).resolve()))
    file = folder / REMEMBERED
    if str(url) == default_storage(folder):
        file.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = {"storage": str(url), "name": name, "password": _has_password(given)}
    file.write_text(json.dumps(record, indent=2) + "\n")


def _has_password(url: sa.URL) -> bool:
    return url.password is not None or any(name in url.query for name in _SECRETS)


@dataclass(frozen=True)
class Remembered:
    """What a sweep's folder knows of its storage."""

    storage: str
    name: str | None = None
    """Of the sweep, which may be one of several there."""
    password: bool = False
    """Whether the address had one, which is not kept."""

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Says what to do where a database refuses an address without its password.

        Raises:
            ValueError: that of the block, with the remedy.
        """
        try:
            yield
        except ValueError as error:
            if not self.password:
                raise
            raise ValueError(
                f"{error} (the folder remembers the address without its password: set PGPASSWORD, "
                "or give --storage again)"
            ) from error


def remembered(folder: Path) -> Remembered | None:
    """What `remember` wrote, else the folder's own database, else None.

    Raises:
        ValueError: the file says something else.
    """
    file = folder / REMEMBERED
    if file.is_file():
        try:
            return Remembered(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is not what `rlkl sweep run` wrote ({error}): delete it and give --storage"
            ) from error
    return Remembered(default_storage(folder)) if (folder / "sweep.db").is_file() else None
