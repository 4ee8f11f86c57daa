"""kill -9 of drivers, workers and cells at random moments: every cell ends once, with one record.

`python tests/sweep/test_exactly_once.py KILLS SEED` does it at length.
"""

import itertools
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from rlkl.sweep.ledger import Ledger
from rlkl.sweep.spec import EvaluationSpec
from rlkl.sweep.study import ConfigurationStudy

HERE = Path(__file__).resolve().parent


def start(spec: Path, out: Path) -> subprocess.Popen[bytes]:
    """`rlkl sweep run` with two workers; of a stored spec (JSON) without its command line."""
    command = [sys.executable, str(HERE / "fake_driver.py"), str(spec), str(out)]
    if spec.suffix == ".yaml":
        main = "from rlkl.cli.main import main; main()"
        words = ["sweep", "run", str(spec), "--workers", "2", "--out", str(out), "--no-report"]
        command = [sys.executable, "-c", main, *words]
    with (out.parent / "driver.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def working(driver: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """The driver's workers, or their cells, as far as they live."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if name in command:
            found.append(process)
    return found


def wait_for_work(driver: subprocess.Popen[bytes], seconds: float = 240) -> bool:
    """Whether a recipe runs before the driver ends."""
    end = time.monotonic() + seconds
    while driver.poll() is None and time.monotonic() < end:
        if working(driver, "fake_recipe.py"):
            return True
        time.sleep(0.05)
    return False


def run_under_fire(spec: Path, out: Path, victims: list[str], draw: random.Random) -> list[str]:
    """Runs a sweep to its end while one victim after the other is killed; who was."""
    driver, killed = start(spec, out), []
    for victim in victims:
        if not wait_for_work(driver):
            break
        time.sleep(draw.uniform(0, 0.4))
        if victim == "driver":
            driver.kill()
            driver.wait()
            time.sleep(draw.uniform(0, 0.3))
            driver = start(spec, out)
        else:
            living = working(driver, f"rlkl.sweep.{victim}")
            if not living:
                continue
            draw.choice(living).kill()
        killed.append(victim)
    if driver.wait(timeout=3000) != 0:
        driver = start(spec, out)
        assert driver.wait(timeout=3000) == 0, (out.parent / "driver.log").read_text()[-2000:]
    return killed


def check_each_cell_ended_once(out: Path, cells: int, steps: int) -> Counter[str]:
    """No cell lost or doubled, in the ledger, in the journal, in the study and in the folders."""
    ledger = Ledger(f"sqlite:///{out.resolve()}/sweep.db")
    rows, journal = ledger.cells(), ledger.attempts()
    assert len(rows) == len({row.key for row in rows}) == cells + 1, "the reference is one more"
    for row in rows:
        mine = [attempt for attempt in journal if attempt["key"] == row.key]
        assert row.state == "done"
        assert [a["number"] for a in mine] == list(range(1, row.attempt + 1))
        assert [a["outcome"] for a in mine].count("done") == 1
        assert mine[-1]["outcome"] == "done"
        if row.configuration < 0:
            continue
        assert len(row.record["points"]) == 1
        run = out / row.key / "run"
        assert not (run / "two_at_once").exists(), "two processes trained in one folder"
        done = [int(step) for step in (run / "steps").read_text().split()]
        assert sorted(set(done)) == list(range(1, steps + 1))
        # A kill between a step and its checkpoint repeats that step, never more.
        assert all(b - a in (0, 1) for a, b in itertools.pairwise(done))
        assert len(done) - steps < row.attempt
    complete = [t for t in ConfigurationStudy(ledger).study.get_trials() if t.values]
    assert len(complete) == cells // len(ledger.spec.seeds)
    return Counter(attempt["outcome"] for attempt in journal)


def test_killing_driver_worker_and_cell_loses_and_doubles_nothing(make_spec, tmp_path):
    settings = {"max_steps": 8, "seconds_per_step": 0.05}
    evaluation = EvaluationSpec(script=str(HERE / "fake_evaluator.py"), reference_samples=8)
    spec = make_spec(settings=settings, seeds=[0], grace=3.0, evaluation=evaluation)
    (tmp_path / "spec.json").write_text(spec.to_json())
    out = tmp_path / "out"
    killed = run_under_fire(
        tmp_path / "spec.json", out, ["worker", "driver", "cell"], random.Random(0)
    )
    assert "driver" in killed
    outcomes = check_each_cell_ended_once(out, cells=4, steps=8)
    assert outcomes["done"] == 5


def test_ctrl_c_stops_with_a_checkpoint_the_same_command_goes_on_and_a_failing_cell_stops_nothing(
    write_spec, tmp_path
):
    spec = write_spec(
        grid={"kl_coef": [0.1, 1.0], "how": [{"fails": 1}, {"fails": 9}, {"diverges": True}]},
        settings={"max_steps": 10, "seconds_per_step": 0.05},
        seeds=[0],
        retries=1,
    )
    out = tmp_path / "out"
    driver = start(spec, out)
    assert wait_for_work(driver)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=300) == 130, (tmp_path / "driver.log").read_text()
    ledger = Ledger(f"sqlite:///{out}/sweep.db")
    assert {cell.state for cell in ledger.cells()} <= {"waiting", "done"}
    assert {a["outcome"] for a in ledger.attempts()} <= {"stopped", "done"}

    assert start(spec, out).wait(timeout=600) == 2, "four cells fail for good"
    assert "4 cells failed" in (tmp_path / "driver.log").read_text()
    for cell in ledger.cells():
        if cell.settings.get("diverges"):
            assert (cell.state, cell.failures) == ("failed", 2)
            assert "points[0].kl is nan" in str(cell.error)
        elif cell.settings.get("fails") == 9:
            assert (cell.state, cell.failures) == ("failed", 2)
            assert "exit code 3" in str(cell.error)
            assert "the loss is not a number" in str(cell.error)
        else:
            assert cell.state == "done"


def main() -> None:
    """Thirty cells of a second each under so many kills."""
    import tempfile

    import yaml

    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp())
    spec = {
        "recipe": str(HERE / "fake_recipe.py"),
        "grid": {
            "kl": [{"kl_estimator": "k1", "kl_placement": "reward"}, {"kl_estimator": "rb"}],
            "kl_coef": [0.1, 0.3, 1.0, 3.0, 10.0],
        },
        "seeds": [0, 1, 2],
        "settings": {"max_steps": 10},
        "evaluation": {"script": str(HERE / "fake_evaluator.py")},
        "heartbeat": 0.2,
        "grace": 2.0,
    }
    (folder / "fire.yaml").write_text(yaml.safe_dump(spec))
    victims = [draw.choice(["driver", "worker", "worker", "cell"]) for _ in range(kills)]
    killed = run_under_fire(folder / "fire.yaml", folder / "out", victims, draw)
    outcomes = check_each_cell_ended_once(folder / "out", cells=30, steps=10)
    print(f"killed {dict(Counter(killed))}; attempts {dict(outcomes)}; 31 cells ended once")


if __name__ == "__main__":
    main()
