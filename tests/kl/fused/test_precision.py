"""Products are rounded where the caller asked, or where it changes nothing, and nowhere else."""

import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlkl.kl import LowRank, ModuleHead, OutputHead, TokenStats, fused_token_loss, fused_token_stats
from rlkl.kl.fused import openblas
from rlkl.kl.fused.precision import gemm_precision
from tests.kl.fused.cases import Case, assert_close, gradients, make, naive, shifted

CPU, GPU = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
BFLOAT16 = torch.bfloat16


def close_models(dtype: torch.dtype) -> Case:
    """Two models that differ little, large enough for oneDNN to take the products."""
    case = shifted(make(n=64, vocab=503, hidden=64), 1e-2).to(dtype)
    hidden = case.policy_hidden / 8
    return case._replace(policy_hidden=hidden, ref_hidden=hidden)


class Bias(nn.Module):
    """A linear head in a module, and a bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T + self.bias


def head_of(kind: str, case: Case) -> OutputHead | ModuleHead:
    """The policy's head, as a matrix, with an adapter that adds nothing, or in a module."""
    if kind == "module":
        return ModuleHead(Bias(case.policy_head.clone(), case.policy_bias.clone()), 503)
    factors = torch.ones(4, 64).float(), torch.zeros(503, 4).float()
    adapters = (LowRank(*factors),) if kind == "lora" else ()
    return OutputHead(case.policy_head, case.policy_bias, adapters=adapters)


def statistics_of(policy: Case, kind: str, case: Case, *, whole_rows: bool) -> TokenStats:
    """Those of the policy's hidden states under a head of this kind."""
    return fused_token_stats(
        policy.policy_hidden,
        head_of(kind, case),
        case.ref_hidden,
        OutputHead(case.ref_head, case.ref_bias),
        case.tokens,
        whole_rows=whole_rows,
    )


class Precisions(TorchDispatchMode):
    """Notes the precision of the process at every matrix product, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[tuple[bool, bool]]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rounded = CPU.fp32_precision == "bf16", GPU.fp32_precision == "tf32"
        self.seen[func.overloadpacket.__name__].add(rounded)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every CPU: of OpenBLAS's products there is nothing to note."""
    monkeypatch.setattr(openblas, "openblas", lambda: None)


@pytest.fixture(params=["highest", "high", "medium"])
def torch_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("kind", ["matrix", "lora", "module"])
def test_torch_own_setting_does_not_round_the_kernels_products(torch_precision, kind, whole_rows):
    case, settings = close_models(torch.float32), (CPU.fp32_precision, GPU.fp32_precision)
    truth, leaves = case.to(torch.float64).leaves()
    expected = naive(truth)
    (expected_gradient,) = gradients(expected.kl.sum(), leaves[:1])
    policy, leaves = case.leaves()
    with Precisions() as products:
        stats = statistics_of(policy, kind, case, whole_rows=whole_rows)
        (gradient,) = gradients(stats.kl.sum(), leaves[:1])
    assert {x for name in ("mm", "addmm") for x in products.seen[name]} == {(False, False)}
    torch.testing.assert_close(stats.kl.double(), expected.kl, rtol=1e-2, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()
    assert (CPU.fp32_precision, GPU.fp32_precision) == settings
    assert torch.get_float32_matmul_precision() == torch_precision


@pytest.mark.parametrize(
    ("kind", "dtype", "gemm_dtype", "temperature", "logits", "gradient"),
    [
        ("matrix", BFLOAT16, None, 1.0, True, False),  # its factors are bfloat16 already
        ("matrix", BFLOAT16, None, 0.7, False, False),  # but not hidden / 0.7
        ("lora", BFLOAT16, None, 1.0, False, False),  # nor hidden Aᵀ
        ("matrix", torch.float32, None, 1.0, False, False),
        ("matrix", torch.float32, BFLOAT16, 1.0, True, True),
        ("lora", torch.float32, BFLOAT16, 1.0, True, True),
    ],
)
def test_products_are_rounded_where_that_was_asked_or_changes_nothing(
    kind, dtype, gemm_dtype, temperature, logits, gradient
):
    case = close_models(dtype)
    policy, _ = case.leaves()
    with Precisions() as products:
        fused_token_loss(
            lambda stats: stats.kl.sum(),
            policy.policy_hidden,
            head_of(kind, policy),
            case.ref_hidden,
            OutputHead(case.ref_head, case.ref_bias),
            case.tokens,
            temperature=temperature,
            gemm_dtype=gemm_dtype,
        )
    assert products.seen["mm"] == {(logits, False)}
    assert products.seen["addmm_"] == {(gradient, False)}


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, BFLOAT16])
def test_an_adapters_product_is_not_rounded_beside_a_bfloat16_weight(factors, whole_rows):
    case = close_models(BFLOAT16)
    g = torch.Generator().manual_seed(4)
    a = torch.randn(16, 64, generator=g).to(factors)
    b = (1e-2 * torch.randn(503, 16, generator=g)).to(factors)
    head = OutputHead(case.policy_head, adapters=(LowRank(a, b, 0.5),))
    stats = fused_token_stats(
        case.policy_hidden,
        head,
        case.policy_hidden,
        case.policy_head,
        case.tokens,
        whole_rows=whole_rows,
    )
    whole = case.policy_head.double() + 0.5 * b.double() @ a.double()
    wide, zero = case.to(torch.float64), torch.zeros(503)
    models = wide.policy_hidden, whole, zero, wide.policy_hidden, wide.policy_head, zero
    expected = naive(Case(*models, case.tokens))
    torch.testing.assert_close(stats.kl.double(), expected.kl, rtol=2e-4, atol=0)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "gemm_dtype"),
    [
        ("module", torch.float32, None),
        ("module", torch.float32, BFLOAT16),
        ("lora", torch.float32, BFLOAT16),
        ("lora", BFLOAT16, None),
    ],
)
def test_a_policy_that_equals_a_reference_of_another_form_has_kl_zero(
    kind, dtype, gemm_dtype, whole_rows
):
    case = close_models(dtype)
    stats = fused_token_stats(
        case.policy_hidden,
        head_of(kind, case),
        case.policy_hidden,
        head_of("matrix", case),
        case.tokens,
        whole_rows=whole_rows,
        gemm_dtype=gemm_dtype,
    )
    assert (stats.kl == 0).all()


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("kind", ["matrix", "lora", "module"])
def test_autocast_rounds_neither_logits_nor_gradients(kind, whole_rows):
    case = close_models(torch.float32)

    def measured() -> list[torch.Tensor]:
        policy, leaves = case.leaves()
        stats = statistics_of(policy, kind, case, whole_rows=whole_rows)
        return [*stats, *gradients(stats.kl.sum(), leaves[:1])]

    expected = measured()
    with torch.autocast("cpu", dtype=BFLOAT16):
        assert_close(measured(), expected, 0, 0)


class Waiting(nn.Module):
    """A head that says that it was called, and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.go_on = threading.Event(), threading.Event()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.called.set()
        assert self.go_on.wait(30)
        return hidden.new_zeros(len(hidden), 503)


def test_a_bfloat16_call_in_another_thread_does_not_round_a_float32_call():
    case, before, found = close_models(torch.float32), CPU.fp32_precision, []
    expected, waiting = naive(case.to(torch.float64)), Waiting()
    inputs = case.policy_hidden, ModuleHead(waiting, 503), case.ref_hidden, case.ref_head

    def rounded() -> None:
        fused_token_stats(*inputs, case.tokens, gemm_dtype=BFLOAT16)

    def precise() -> None:
        found.append(fused_token_stats(*case.positional, **case.bias))

    threads = [threading.Thread(target=x) for x in (rounded, precise, rounded)]
    threads[0].start()
    assert waiting.called.wait(30)
    for thread in threads[1:]:
        thread.start()
    threads[1].join(0.2)  # enough for a call that does not wait
    waiting.go_on.set()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found[0].kl.double(), expected.kl, rtol=1e-2, atol=0)
    assert CPU.fp32_precision == before


def test_the_last_of_overlapping_sections_restores_the_precision():
    before = CPU.fp32_precision
    first, second = gemm_precision(BFLOAT16), gemm_precision(BFLOAT16)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert CPU.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert CPU.fp32_precision == before


def test_a_precision_inherited_from_torch_is_inherited_afterwards():
    CPU.fp32_precision = "none"
    torch.backends.fp32_precision = "bf16"
    try:
        with gemm_precision(None):
            assert CPU.fp32_precision == "ieee"
        assert CPU.fp32_precision == "bf16"
    finally:
        torch.backends.fp32_precision = "none"
    assert CPU.fp32_precision == "none"
