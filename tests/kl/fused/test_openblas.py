"""OpenBLAS multiplies as torch does, where it is the faster, with one thread."""

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llvmlite import binding
from torch import Tensor

from rlkl.kl import fused_token_stats
from rlkl.kl.fused import openblas
from rlkl.kl.fused.openblas import OpenBlas, addmm, load_openblas
from rlkl.kl.fused.precision import gemm_precision
from tests.kl.fused.cases import combine, make

EPS = torch.finfo(torch.float32).eps
LAYOUTS = ["rows", "columns", "part of rows", "part of columns", "every second"]


@pytest.fixture(scope="module")
def blas() -> OpenBlas:
    loaded = load_openblas()
    assert loaded is not None, "SciPy from PyPI brings OpenBLAS"
    return loaded


@pytest.fixture
def chosen(blas: OpenBlas, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """OpenBLAS whatever the CPU; the sizes of the products that it made."""
    sizes = list[tuple[int, ...]]()

    class Counted(OpenBlas):
        def addmm(self, out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float) -> None:
            sizes.append((*a.shape, b.shape[1]))
            super().addmm(out, a, b, alpha=alpha, beta=beta)

    counted = Counted(*blas)
    monkeypatch.setattr(openblas, "openblas", lambda: counted)
    return sizes


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrix(rows: int, columns: int, layout: str, generator: torch.Generator) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    if layout == "rows":
        return normal(rows, columns)
    if layout == "columns":
        return normal(columns, rows).t()
    if layout == "part of rows":
        return normal(rows, columns + 3)[:, 1 : columns + 1]
    if layout == "part of columns":
        return normal(columns, rows + 3).t()[2 : rows + 2]
    return normal(2 * rows, 2 * columns)[::2, ::2]


@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 7, 17, 64, 131])] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    alpha=st.sampled_from([1.0, -0.3]),
    beta=st.sampled_from([0.0, 1.0, 0.5]),
)
def test_products_are_those_of_float64(blas, sizes, layouts, alpha, beta):
    n, k, m = sizes
    generator = torch.Generator().manual_seed(n + k + m)
    a = matrix(n, k, layouts[0], generator)
    b = matrix(k, m, layouts[1], generator)
    around = torch.randn(n, m + 2, generator=generator, dtype=torch.float32)
    out, before = around[:, 1 : m + 1], around.double()
    if beta == 0:
        out.fill_(torch.nan)  # must not be read
    blas.addmm(out, a, b, alpha=alpha, beta=beta)
    expected = alpha * (a.double() @ b.double())
    if beta != 0:
        expected += beta * before[:, 1 : m + 1]
    size = abs(alpha) * (a.double().abs() @ b.double().abs()) + before[:, 1 : m + 1].abs()
    assert ((out.double() - expected).abs() <= 2 * (k + 2) * EPS * size).all()
    beside = [0, m + 1]
    assert torch.equal(around[:, beside].double(), before[:, beside])


@pytest.mark.parametrize("name", ["columns", "double", "no columns to sum"])
def test_torch_multiplies_what_openblas_cannot(chosen, one_thread, name):
    dtype = torch.float64 if name == "double" else torch.float32
    a = torch.randn(3, 0 if name == "no columns to sum" else 5, dtype=dtype)
    b = torch.randn(a.shape[1], 4, dtype=dtype)
    out = torch.ones(3, 4, dtype=dtype)
    out = out.t().contiguous().t() if name == "columns" else out
    addmm(out, a, b)
    assert chosen == []
    torch.testing.assert_close(out, 1 + a @ b)  # of no columns: 1


def test_it_is_left_to_torch_to_round_and_to_divide_a_product(chosen, torch_threads):
    a, b, out = (torch.randn(8, 8, dtype=torch.float32) for _ in range(3))
    addmm(out, a, b, beta=0, rounded=True)
    assert chosen == []
    addmm(out, a, b, beta=0)
    assert chosen == ([(8, 8, 8)] if torch_threads == 1 else [])
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize(
    ("cpu", "avx512", "expected"),
    [("znver4", True, True), ("znver3", False, False), ("sapphirerapids", True, False)],
)
def test_it_is_taken_on_newer_cpus_of_amd(monkeypatch, cpu, avx512, expected):
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: cpu)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx512f": avx512})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert (openblas.openblas.__wrapped__() is not None) == expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert openblas.openblas.__wrapped__() is None


def test_nothing_is_taken_where_scipy_has_another_library(monkeypatch):
    built = {"Build Dependencies": {"blas": {"name": "mkl"}}}
    monkeypatch.setattr("scipy.show_config", lambda mode: built)
    assert load_openblas() is None


@pytest.mark.parametrize("name", ["llvmlite", "numba", "scipy", "threadpoolctl"])
def test_nothing_is_taken_where_something_is_not_installed(monkeypatch, name):
    found = openblas.importlib.util.find_spec
    monkeypatch.setattr(
        openblas.importlib.util, "find_spec", lambda x: None if x == name else found(x)
    )
    monkeypatch.setitem(sys.modules, name, None)
    assert load_openblas() is None


def test_openblas_has_one_thread_in_a_section_and_its_own_after(chosen, blas):
    def threads() -> set[int]:
        return {library["num_threads"] for library in blas.threads.info()}

    with blas.threads.limit(limits=2):
        before = threads()
        assert before == {2}, "a machine with two cores at least"
        with gemm_precision(None):
            assert threads() == {1}
            with gemm_precision(None):
                assert threads() == {1}
            assert threads() == {1}
        assert threads() == before


@pytest.mark.parametrize("vocab", [503, 20_011])
def test_statistics_and_gradients_are_those_of_float64(chosen, torch_threads, vocab):
    results = []
    for dtype in (torch.float64, torch.float32):
        case, leaves = make(n=12, vocab=vocab).to(dtype).leaves()
        stats = fused_token_stats(*case.positional, **case.bias, whole_rows=True)
        assert bool(chosen) == (dtype == torch.float32 and (torch_threads == 1 or vocab > 20_000))
        found = torch.autograd.grad(combine(stats, *torch.ones(3, 12, dtype=dtype)), leaves)
        results.append([*stats, *found])
    for exact, found in zip(*results, strict=True):
        atol = 1e-5 * float(exact.detach().abs().max())
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=atol)
