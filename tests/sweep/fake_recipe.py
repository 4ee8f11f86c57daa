"""A recipe that takes a second, checkpoints every step, and can be made to fail: for the tests."""

import fcntl
import json
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import yaml


@dataclass
class Settings:
    output_dir: str
    seed: int = 0
    kl_estimator: str = "rb"
    kl_placement: str = "both"
    kl_coef: float = 0.1
    max_steps: int = 10
    seconds_per_step: float = 0.1
    fails: int = 0
    """So many attempts end with code 3."""
    diverges: bool = False
    """What it leaves has no finite KL."""
    response_length: int = 24


SETTINGS = (Settings,)


def main() -> None:
    given = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    known = {f.name for f in fields(Settings)}
    settings = Settings(**{k: v for k, v in given.items() if k in known})
    out = Path(settings.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    alone = (out / "alone").open("w")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (out / "two_at_once").touch()
    with (out / "attempts").open("a") as file:
        file.write("started\n")
    attempt = (out / "attempts").read_text().count("started")
    stop: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(1))
    checkpoint = out / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    while step < settings.max_steps:
        time.sleep(settings.seconds_per_step)
        step += 1
        with (out / "steps").open("a") as file:
            file.write(f"{step}\n")
        temporary = out / "checkpoint.tmp"
        temporary.write_text(str(step))
        temporary.replace(checkpoint)
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        if attempt <= settings.fails and step >= settings.max_steps // 2:
            print("the loss is not a number")
            sys.exit(3)
        if stop:
            sys.exit(130)


if __name__ == "__main__":
    main()
