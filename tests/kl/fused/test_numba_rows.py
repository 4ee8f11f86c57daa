"""The passes that Numba compiles: right to float32's last digits, and used where they can be."""

import importlib.util
import math
import os
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlkl.kl import OutputHead, fused_token_stats
from rlkl.kl.fused import numba_rows, torch_rows
from rlkl.kl.fused.engine import MAX_T
from rlkl.kl.fused.problem import row_passes

SUMS = ("peak", "p_sum", "a_sum", "t_mean", "t_max", "t_sum", "phi_sum")
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def float32():
    """What these passes are for, where other tests of the package compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def read(a: Tensor, b: Tensor | None, with_phi: bool = True) -> dict[str, Tensor]:
    rows = {name: torch.full((len(a), 1), torch.nan) for name in SUMS}
    numba_rows.read_rows(a, b, rows, with_phi=with_phi)
    return rows


def logits(n: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two matrices whose rows do not follow upon each other in memory."""
    g = torch.Generator().manual_seed(seed)
    a = 3 * torch.randn(n, vocab + 5, generator=g)
    return a[:, :vocab], (a + 0.3 * torch.randn(n, vocab + 5, generator=g))[:, :vocab]


@pytest.mark.parametrize("vocab", [1, 7, 8, 33, 4096, 4097, 9001])
def test_rows_are_read_as_in_float64(vocab):
    a, b = logits(3, vocab)
    b += 6.1  # E_p[t], of which rounding leaves something
    x, y = a.double(), b.double()
    rows = read(a, b)
    peak = x.amax(1, keepdim=True)
    p = (x - peak).exp()
    mean = (p * (y - x)).sum(1, keepdim=True) / p.sum(1, keepdim=True)
    t = y - x - mean
    torch.testing.assert_close(a.double(), p, rtol=3e-6, atol=1e-30)
    torch.testing.assert_close(b.double(), t, rtol=0, atol=3e-6)
    expected = (
        peak,
        p.sum(1, keepdim=True),
        (p * (x - peak)).sum(1, keepdim=True),
        mean,
        t.amax(1, keepdim=True),
        (p * b.double()).sum(1, keepdim=True),
        (p * (t.exp() - 1 - t)).sum(1, keepdim=True),
    )
    for name, value in zip(SUMS, expected, strict=True):
        torch.testing.assert_close(rows[name].double(), value, rtol=3e-6, atol=3e-6)


def test_a_reference_does_not_change_a_bit_of_the_policys_sums():
    a, b = logits(3, 9001)
    p, t = [a.clone() for _ in range(3)], [b.clone() for _ in range(2)]
    alone, joint = read(p[0], None), read(p[1], t[0])
    known = read(p[2], t[1], with_phi=False)
    for name in ("peak", "p_sum", "a_sum"):
        assert alone[name].equal(joint[name])
        assert alone[name].equal(known[name])
    assert p[0].equal(p[1])
    assert p[0].equal(p[2])
    assert t[0].equal(t[1])
    torch.testing.assert_close(joint["t_sum"], known["t_sum"], rtol=1e-5, atol=1e-7)
    assert known["phi_sum"].isnan().all()


@given(st.floats(max_value=60, allow_infinity=False, width=32))
def test_phi_has_all_its_digits_everywhere(x):
    with mpmath.workdps(60):
        expected = float(mpmath.exp(x) - 1 - mpmath.mpf(x))
    assert float(numba_rows._phi(np.float32(x))) == pytest.approx(expected, rel=8 * EPS, abs=1e-38)


@given(st.floats(-18, -0.5), st.sampled_from([-1, 1]))
def test_phi_has_all_its_digits_near_zero(digits, sign):
    x = np.float32(sign * 10**digits)
    expected = sum(float(x) ** k / math.factorial(k) for k in range(2, 25))
    assert float(numba_rows._phi(x)) == pytest.approx(expected, rel=8 * EPS, abs=1e-37)


@given(st.floats(-86, 87, width=32))
def test_exp_is_exp(x):
    assert float(numba_rows._exp(np.float32(x))) == pytest.approx(math.exp(x), rel=3 * EPS)


@pytest.mark.parametrize("x", [-87.5, -1000.0, -math.inf])
def test_exp_below_the_normal_numbers_is_zero(x):
    assert numba_rows._exp(np.float32(x)) == 0


@given(st.floats(-87, 0))
def test_log_of_a_probability_is_log(power):
    x = np.float32(math.exp(power))
    assert float(numba_rows._log(x)) == pytest.approx(math.log(x), rel=2 * EPS, abs=EPS / 4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("of_ref", [False, True])
def test_what_is_not_a_number_stays_in_its_row(of_ref, sign):
    a, b = logits(3, 41)
    (b if of_ref else a)[1, 17] = math.copysign(math.nan, sign)
    rows = read(a, b)
    assert not (rows["t_max"][1] < MAX_T)
    names = ("t_mean", "phi_sum") if of_ref else SUMS[1:4]
    for name in names:
        assert rows[name].isnan()[:, 0].tolist() == [False, True, False]


@pytest.mark.parametrize("with_phi", [False, True])
def test_rows_with_tokens_that_one_model_forbids_are_marked(with_phi):
    a, b = logits(2, 41)
    a[1, 3] = -torch.inf
    rows = read(a, b, with_phi)
    assert rows["a_sum"].isfinite().all()
    assert (rows["t_max"] < MAX_T)[:, 0].tolist() == [True, False]
    assert a[1, 3] == 0
    assert rows["p_sum"].isfinite().all()


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_the_gradient_is_the_formula(kl, entropy, token, slope):
    p, t = (x.clone() for x in logits(3, 41))
    p.exp_().clamp_(max=1)
    p[0, 4] = 0
    tokens, columns = torch.tensor([[4], [0], [40]]), torch.randn(4, 3, 1)
    constant, t_factor, log_factor, token_gradient = columns
    slopes = torch.rand(3, 41)
    factor = constant.double().expand(3, 41).clone()
    if kl:
        factor += t_factor * t.double()
    if entropy:
        factor += log_factor * p.double().clamp(min=torch.finfo(torch.float32).tiny).log()
    expected = p.double() * factor
    if token:
        expected.scatter_add_(1, tokens, token_gradient.double())
    if slope:
        expected *= slopes
    numba_rows.gradient_rows(
        p,
        t if kl else None,
        slopes if slope else None,
        tokens,
        constant,
        t_factor if kl else None,
        log_factor if entropy else None,
        token_gradient if token else None,
    )
    torch.testing.assert_close(p.double(), expected, rtol=2e-6, atol=2e-6)


def test_numba_is_used_in_float32_on_a_cpu_where_it_is_installed(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert row_passes(cpu, torch.float32) is numba_rows
    assert row_passes(cpu, torch.float64) is torch_rows
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert row_passes(cpu, torch.float32) is torch_rows
    assert row_passes(cuda, torch.float32) is torch_rows


def test_where_compiled_code_cannot_be_kept_it_is_compiled_all_the_same(monkeypatch):
    asked = []

    def nowhere_to_keep(signature, **options):
        asked.append(options)
        if "cache" in options:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(numba_rows, "njit", nowhere_to_keep)
    assert numba_rows._compile()(len) is len
    assert [("cache" in options) for options in asked] == [True, False]


SUMS_AND_GRADIENTS = """
import hashlib, torch
from rlkl.kl.fused import numba_rows

generator = torch.Generator().manual_seed(0)
policy, ref = torch.randn(2, 16, 9001, generator=generator)
columns = torch.randn(3, 16, 1, generator=generator)
names = "peak", "p_sum", "a_sum", "t_mean", "t_max", "t_sum", "phi_sum"
found = []
for b, with_phi in (None, True), (ref, True), (ref, False):
    p, t, rows = policy.clone(), b if b is None else b.clone(), torch.zeros(7, 16, 1)
    numba_rows.read_rows(p, t, dict(zip(names, rows)), with_phi=with_phi)
    found += [p, rows]
    for log in None, columns[2]:
        gradient = p.clone()
        factors = columns[0], None if t is None else columns[1], log, columns[0]
        numba_rows.gradient_rows(gradient, t, None, torch.arange(16)[:, None], *factors)
        found.append(gradient)
print([hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in found])
"""


def test_the_process_that_compiles_computes_what_later_ones_do(tmp_path):
    def run() -> str:
        command = [sys.executable, "-c", SUMS_AND_GRADIENTS]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    compiled = run()
    assert list(tmp_path.rglob("*_read*.nbc")), "nothing was kept for the second process"
    assert run() == compiled


def test_each_thread_reads_its_share_of_the_rows(threads, monkeypatch):
    seen = []

    def counted(p, *rest, **options):
        seen.append(len(p))
        return read_rows(p, *rest, **options)

    read_rows = numba_rows.read_rows
    monkeypatch.setattr(numba_rows, "read_rows", counted)
    hidden, head = torch.randn(5, 3), OutputHead(torch.randn(41, 3))
    tokens = torch.arange(5)
    fused_token_stats(hidden, head, hidden, head, tokens, whole_rows=True)
    assert sorted(seen) == ([5] if threads == 1 else [2, 3])
