"""The order of the packages: each imports only those before it, and the mathematics torch alone."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = ["kl", "rl", "models", "data", "rollout", "trainers", "evaluation", "sweep", "cli"]
MODULES = sorted((ROOT / "rlkl").rglob("*.py"))
MATHEMATICS = {"torch", "jaxtyping"} | sys.stdlib_module_names
# What makes the fused functions faster: imported where it is found, and only by its own module.
FASTER = {
    "triton_rows.py": {"triton"},
    "numba_rows.py": {"llvmlite", "numba", "numpy"},
    "openblas.py": {"llvmlite", "numba", "scipy", "threadpoolctl"},
}
MAX_LINES = 500
LONGER: set[str] = set()

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def package_of(path: Path) -> str | None:
    """Which package of the list a module belongs to: rlkl/kl/fused.py -> kl, rlkl/cli.py -> cli.

    What `python -m rlkl` runs is the command's.
    """
    name = path.relative_to(ROOT / "rlkl").parts[0].removesuffix(".py")
    return {"__init__": None, "__main__": "cli"}.get(name, name)


def imported(source: str, package: str = "") -> Iterator[str]:
    """Full names of everything imported anywhere in a source, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = [*parents, node.module] if node.level else [node.module]
            stem = ".".join(part for part in base if part)
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return set(imported(path.read_text(), package))


def rooms(names: set[str]) -> set[str]:
    """Which of rlkl's packages are named."""
    return {name.split(".")[1] for name in names if name.startswith("rlkl.")} & set(ORDER)


@every_module
def test_imports_only_go_down_the_list(path):
    package = package_of(path)
    if package is None:
        assert not rooms(imports_of(path)), "importing rlkl imports no package"
        return
    assert package in ORDER, f"{package} is not a room of ARCHITECTURE.md: add it to ORDER too"
    above = ORDER[ORDER.index(package) + 1 :]
    assert not rooms(imports_of(path)) & set(above)


@pytest.mark.parametrize("package", ["kl", "rl"])
def test_the_mathematics_needs_torch_and_jaxtyping_only(package):
    """What else is used is looked for when it is needed, and missed without harm."""
    names: set[str] = set()
    for path in (ROOT / "rlkl" / package).rglob("*.py"):
        allowed = MATHEMATICS | {"rlkl"} | FASTER.get(path.name, set())
        assert not {n for n in imports_of(path) if n.split(".")[0] not in allowed}, path
        names |= imports_of(path)
    assert rooms(names) <= {"kl", "rl"}


def test_reward_models_know_nothing_of_training():
    names = {n for p in (ROOT / "reward_models").rglob("*.py") for n in imports_of(p)}
    assert rooms(names) <= {"data"}


@every_module
def test_a_module_is_a_chapter_not_a_book(path):
    if str(path.relative_to(ROOT)) not in LONGER:
        assert len(path.read_text().splitlines()) <= MAX_LINES


def test_no_file_is_named_after_nothing():
    folders = ("rlkl", "reward_models", "recipes", "tests")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert not [p for p in files if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_the_search_sees_imports_inside_functions_and_relative_ones():
    source = "def f():\n    from rlkl.trainers import ppo\n    import_module('rlkl.sweep')\n"
    assert rooms(set(imported(source))) == {"trainers", "sweep"}
    assert set(imported("from ..rollout import collect", "rlkl.kl")) == {"rlkl.rollout.collect"}
    assert set(imported("from . import ppo", "rlkl.trainers")) == {"rlkl.trainers.ppo"}
