"""Specs of a fake recipe, a synthetic sweep, and a PostgreSQL server of the tests' own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import yaml

from rlkl.sweep.records import Point, SweepResult
from rlkl.sweep.spec import EvaluationSpec, SweepSpec

HERE = Path(__file__).parent


@pytest.fixture
def write_spec(tmp_path: Path) -> Callable[..., Path]:
    """Writes the YAML of a sweep of the fake recipe."""

    def write(**changes: Any) -> Path:
        data = {
            "recipe": str(HERE / "fake_recipe.py"),
            "grid": {
                "kl": [
                    {"kl_estimator": "k1", "kl_placement": "reward"},
                    {"kl_estimator": "rb", "kl_placement": "both"},
                ],
                "kl_coef": [0.1, 1.0],
            },
            "seeds": [0, 1],
            "settings": {"max_steps": 4, "seconds_per_step": 0.02},
            "evaluation": {"script": str(HERE / "fake_evaluator.py"), "reference_samples": 8},
            "heartbeat": 0.2,
            "grace": 20.0,
        } | changes
        file = tmp_path / "fake.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
        return file

    return write


@pytest.fixture
def make_spec() -> Callable[..., SweepSpec]:
    """A spec of the fake recipe that need not be read and checked."""

    def make(**changes: Any) -> SweepSpec:
        evaluation = EvaluationSpec(script=str(HERE / "fake_evaluator.py"), reference_samples=0)
        values = {
            "name": "fake",
            "recipe": str(HERE / "fake_recipe.py"),
            "grid": {"kl_estimator": ["k1", "rb"], "kl_coef": [0.1, 1.0]},
            "settings": {"max_steps": 4, "seconds_per_step": 0.02},
            "seeds": [0, 1],
            "evaluation": evaluation,
            "heartbeat": 0.2,
            "grace": 20.0,
        }
        return SweepSpec(**(values | changes))

    return make


@pytest.fixture(scope="session")
def make_result() -> Callable[..., SweepResult]:
    """A synthetic sweep: rb needs less KL for its reward than k1; the judge turns at 2 nats."""

    def make(configurations: int = 8, seeds: int = 3, checkpoints: int = 1) -> SweepResult:
        noise = np.random.default_rng(0)
        points = []
        for number in range(configurations):
            arm, strength = ("k1", "rb")[number % 2], 1 + number // 2
            for seed in range(seeds):
                for step in range(1, checkpoints + 1):
                    share = step / checkpoints
                    kl = share * (1.3 if arm == "k1" else 1.0) * strength
                    kl += 0.05 * noise.random()
                    reward = float(2 * np.log1p(share * strength) + 0.05 * noise.normal())
                    points.append(
                        Point(
                            run_id=f"{number:03d}-seed{seed}",
                            arm=arm,
                            label=f"{arm} kl_coef={1 / strength:.3g}",
                            configuration=number,
                            seed=seed,
                            kl_coef=1 / strength,
                            step=step,
                            last=step == checkpoints,
                            kl=float(kl),
                            kl_se=0.05,
                            reward=reward,
                            reward_se=0.1,
                            judge=reward - max(0.0, 2 * (float(kl) - 2)),
                            judge_se=0.1,
                            seconds=100.0,
                            estimator=arm,
                        )
                    )
        grid = [0.1 * (i + 1) for i in range(40)]
        reference = {
            "reward": 0.0,
            "reward_se": 0.1,
            "judge": 0.0,
            "judge_se": 0.1,
            "samples": 512,
            "trusted_kl": 3.47,
            "half_sample_drop": 0.02,
            "optimal": [
                {
                    "beta": 1.0,
                    "kl": kl,
                    "kl_se": 0.05,
                    "reward": 3 * float(np.log1p(kl)),
                    "reward_se": 0.1,
                    "others": {"judge": [2 * float(np.log1p(kl)), 0.1]},
                    "trusted": kl <= 3.47,
                }
                for kl in grid
            ],
            "best_of_n": [
                {
                    "n": 2**i,
                    "kl_bound": float(np.log(2**i) - (2**i - 1) / 2**i),
                    "reward": 2.5 * float(np.log1p(i)),
                    "reward_se": 0.1,
                    "others": {"judge": [2 * float(np.log1p(i)), 0.1]},
                }
                for i in range(9)
            ],
        }
        text = {"step": 1, "prompt": "This <b>film", "response": " was & is", "reward": 1.0}
        samples = {point.run_id: [text] for point in points}
        spec = {"seeds": list(range(seeds)), "evaluation": {"prompts": 8}}
        return SweepResult("made", points, reference, samples, {}, spec, {"torch": "2"})

    return make


def _postgres_programs() -> Path | None:
    on_path = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = [Path(on_path)] if on_path else debian[-1:]
    return found[0].parent if found else None


def skip(reason: str) -> NoReturn:
    """Skips a test with its reason printed, or fails it where nothing may be skipped."""
    if os.environ.get("RLKL_TESTS_MUST_NOT_SKIP"):
        pytest.fail(reason)
    print(f"\nskipped: {reason}", file=sys.__stdout__)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> str:
    """A Chromium; skipped where none is installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    skip("no Chromium is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real server in a folder of its own, reached by a socket there; skipped where none is
    installed.
    """
    programs = _postgres_programs()
    if programs is None:
        skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    # A server refuses to run as root; Debian's package brings a user for it.
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="rlkl-postgres-"))
    if user is not None:
        shutil.chown(folder, user)

    def call(program: str, *words: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *words]
        subprocess.run(
            command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=60
        )

    call("initdb", "-A", "trust", "-U", "rlkl", "--no-sync")
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
    yield f"postgresql://rlkl@/postgres?host={folder}"
    call("pg_ctl", "-w", "-m", "immediate", "stop")
    shutil.rmtree(folder)
