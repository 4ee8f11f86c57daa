"""Reads an offline W&B run back, for tests that ask what was sent."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2


def without_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where W&B finds no key and nobody answers."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "90")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")

    def asked(*args: object) -> None:
        raise AssertionError("W&B asked for something")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("getpass.getpass", asked)


def offline_records(folder: Path, patience: float = 60.0) -> list[wandb_internal_pb2.Record]:
    """All records of the one offline run below a folder, once its last one is there.

    W&B's own process writes the end of a finished run a moment after `finish` has returned.
    """
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + patience
    while True:
        records = []
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            records.append(record)
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.1)


def leveldb_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks that hold chunks of checksum, length, and place (7 bytes).

    The file opens with a header of 7 bytes; a chunk is a record (1), or its first (2), middle (3)
    or last part (4); what is left of a block that is too short for a chunk's header is padding.
    """
    position, record = 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, place = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # still being written
            return
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if place in (1, 4):
            yield record
            record = b""


def history(records: list[wandb_internal_pb2.Record]) -> list[dict]:
    rows = [r.history.item for r in records if r.HasField("history")]
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row} for row in rows
    ]
