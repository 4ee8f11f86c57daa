"""The single pass: its gradients, its memory, its threads, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlkl.kl import (
    ModuleHead,
    TokenStats,
    TopK,
    fused_divergence,
    fused_token_loss,
    fused_token_stats,
    reverse_kl,
)
from rlkl.kl.fused import functions, workers
from rlkl.kl.fused.workers import Shared, Workers
from tests.kl.fused.cases import (
    assert_close,
    combine,
    gradients,
    make,
    naive,
    weights,
)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.usefixtures("small_tiles")
def test_no_tensor_is_larger_than_the_logits_of_a_chunk():
    torch.set_num_threads(1)
    case, chunk_size = make(n=200, vocab=101), 16
    policy, leaves = case.leaves()
    with LargestTensor() as fused:
        loss, _ = fused_token_loss(
            combine, *policy.positional, *weights(200), **policy.bias, chunk_size=chunk_size
        )
        gradients(loss, leaves)
        stats = fused_token_stats(*policy.positional, **policy.bias, chunk_size=chunk_size)
        gradients(stats.kl.sum(), leaves)
    assert fused.numel == 2 * chunk_size * 101  # both models, whatever the number of tokens
    with LargestTensor() as whole:
        naive(case)
    assert whole.numel == 200 * 101


def test_loss_backward_scales_by_the_upstream_scalar_and_only_once():
    case, w = make(), weights(29)
    policy, leaves = case.leaves()
    loss, stats = fused_token_loss(combine, *policy.positional, *w, **policy.bias)
    assert not any(x.requires_grad for x in stats)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves)
    assert_close(thrice, [3 * x for x in once], 1e-14, 1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_loss_under_no_grad_is_the_value_alone():
    case, w = make(), weights(29)
    policy, _ = case.leaves()
    with torch.no_grad():
        loss, _ = fused_token_loss(combine, *policy.positional, *w, **policy.bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, combine(naive(case), *w))


def test_a_loss_that_ignores_the_statistics_of_a_chunk_has_no_gradient_there():
    case = make()
    policy, leaves = case.leaves()
    first = torch.arange(29) < 10

    def loss_fn(stats: TokenStats, mask: Tensor) -> Tensor:
        return stats.kl[mask].sum() if mask.any() else torch.zeros(())

    loss, stats = fused_token_loss(loss_fn, *policy.positional, first, **policy.bias, chunk_size=10)
    hidden_gradient, *_ = gradients(loss, leaves)
    assert torch.allclose(loss, stats.kl[:10].sum())
    assert (hidden_gradient[:10] != 0).any()
    assert (hidden_gradient[10:] == 0).all()


def test_threads_are_left_as_they_were_and_inference_mode_works(threads):
    case = make()
    with torch.inference_mode():
        stats = fused_token_stats(*case.positional, **case.bias, chunk_size=10)
    assert_close(stats, naive(case), 1e-11, 1e-11)
    assert torch.get_num_threads() == threads


BAD = {
    "temperature": {"temperature": 0.0},
    "chunk_size": {"chunk_size": 0},
    "vocab_size": {"vocab_size": 102},
    "gemm_dtype": {"gemm_dtype": torch.float16},
    "CPU": {"gemm_dtype": torch.bfloat16},  # with float64 inputs
    "policy_bias": {"policy_bias": torch.zeros(3)},
    "pass vocab_size": {"ref_head": torch.zeros(103, 11)},
    "ref_hidden has shape": {"ref_hidden": torch.zeros(29, 12)},
    "tokens lie in": {"tokens": torch.full((29,), 101)},
    r"tokens is .*int64 of shape \(29, 1\): pass": {"tokens": torch.zeros(29, 1, dtype=torch.long)},
    r"tokens is .*int64 of shape \(\): pass": {"tokens": torch.tensor(3)},
    "tokens is .*float32": {"tokens": torch.zeros(29, dtype=torch.float32)},
    "tokens is .*bool": {"tokens": torch.zeros(29, dtype=torch.bool)},
    "tokens is .*uint8": {"tokens": torch.zeros(29, dtype=torch.uint8)},
    "tokens is list": {"tokens": [0] * 29},
    "policy_head is Linear: pass its weight": {"policy_head": torch.nn.Linear(7, 101)},
    "ref_head is NoneType: pass its weight": {"ref_head": None},
    r"policy_head is .* \(7,\): pass its weight": {"policy_head": torch.zeros(7)},
    r"ref_head is .* \(2, 101, 11\): pass": {"ref_head": torch.zeros(2, 101, 11)},
    "policy_head is .*int8": {"policy_head": torch.zeros(101, 7, dtype=torch.int8)},
    "policy_hidden is .*complex64": {"policy_hidden": torch.zeros(29, 7, dtype=torch.complex64)},
    "policy_head.module has active dropout": {
        "policy_head": ModuleHead(nn.Sequential(nn.Dropout(0.1), nn.Linear(7, 101)), 101)
    },
    "returned 100 logits per token, fewer than 101": {
        "policy_head": ModuleHead(nn.Linear(7, 100), 101)
    },
    "returned 1 logits per token": {"policy_head": ModuleHead(nn.Linear(7, 1), 101)},
    "divergence is NoneType: pass a name": {"divergence": None},
    "divergence is function: pass a name": {"divergence": reverse_kl},
    r"divergence=TopK\(k=2.5\)": {"divergence": TopK(2.5)},  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("named", BAD)
def test_bad_arguments_are_refused_by_name(named):
    case = make()
    names = ("policy_hidden", "policy_head", "ref_hidden", "ref_head", "tokens")
    arguments = dict(zip(names, case.positional, strict=True)) | BAD[named]
    with pytest.raises(ValueError, match=named):
        fused_token_stats(**arguments)


def test_a_divergence_without_tokens_refuses_topk_which_needs_them():
    with pytest.raises(ValueError, match=r"TopK\(k=5\) needs the sampled tokens"):
        fused_divergence(*make().positional[:4], TopK(5))  # pyright: ignore[reportArgumentType]


def test_bad_losses_are_refused_by_name():
    case = make()

    def loss(loss_fn, *per_token):
        return fused_token_loss(loss_fn, *case.positional, *per_token)

    with pytest.raises(ValueError, match=r"per_token\[0\] is .* \(28,\): pass a tensor of 29 rows"):
        loss(combine, torch.zeros(28))
    with pytest.raises(ValueError, match=r"per_token\[0\] is list: pass a tensor of 29 rows"):
        loss(combine, [0.0] * 29)
    with pytest.raises(ValueError, match="detach"):
        loss(combine, torch.zeros(29, requires_grad=True))
    for returned in (lambda stats: stats.kl, lambda stats: None, lambda stats: 1.0):
        with pytest.raises(ValueError, match=r"loss_fn returned .*: return a scalar"):
            loss(returned)


def test_each_worker_computes_with_one_thread(threads):
    seen = []

    def work(_: int) -> None:
        torch.zeros(2).add_(1)  # a thread's first operation sets its number of threads
        seen.append(torch.get_num_threads())

    with Workers(threads) as pool:
        pool.run(work)
        assert torch.get_num_threads() == threads
    assert seen == [1] * threads
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_each_worker_computes_in_the_callers_mode(threads, mode):
    def modes(_: int) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with Workers(threads) as pool, mode():
        assert set(pool.run(modes)) == {(False, mode is torch.inference_mode)}


@pytest.mark.parametrize("divide_products", [False, True])
def test_torch_has_one_thread_between_the_parts_of_workers_that_divide_products(
    threads, divide_products
):
    """Its others would spin on the cores that the next parts start on."""
    with Workers(threads, divide_products=divide_products) as pool:
        between = 1 if divide_products else threads
        assert torch.get_num_threads() == between
        with pool.torch_threads():
            assert torch.get_num_threads() == threads
            assert pool.run(lambda _: torch.get_num_threads()) == [1] * threads
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == between
    assert torch.get_num_threads() == threads


def test_the_callers_functions_have_all_of_torchs_threads(threads):
    case, seen = make(n=9, vocab=23).to(torch.float32), []

    def loss_fn(stats):
        seen.append(torch.get_num_threads())
        return stats.kl.sum()

    policy, leaves = case.leaves()
    gradients(fused_token_loss(loss_fn, *policy.positional, **policy.bias)[0], leaves)
    fused_token_stats(
        *case.positional,
        **case.bias,
        on_logits=lambda *_: seen.append(torch.get_num_threads()),
    )
    assert seen == [threads] * 2


@pytest.mark.parametrize("divide_products", [False, True])
def test_products_are_one_piece_or_many_that_workers_take(threads, divide_products, monkeypatch):
    monkeypatch.setattr(workers, "_PIECE_COLUMNS", (3, 30))
    seen, taken = set(), []

    def work(worker: int) -> None:
        seen.add(worker)
        taken.extend(pieces)

    with Workers(threads, divide_products=divide_products) as pool:
        pieces = Shared(pool.pieces(101))
        pool.multiply(work)
    divided = divide_products and threads > 1
    assert seen == set(range(threads if divided else 1))
    assert sorted(i for piece in taken for i in range(101)[piece]) == list(range(101))
    widths = [piece.stop - piece.start for piece in sorted(taken, key=lambda x: x.start)]
    assert widths[0] == (20 if divided else 101)
    assert sorted(widths, reverse=True) == widths
    assert min(widths[:-1], default=3) >= 3


def test_a_call_gives_the_same_bits_whichever_thread_takes_what(threads):
    case = make(n=64, vocab=997, hidden=64, ref=64).to(torch.float32)

    def once() -> list[torch.Tensor]:
        policy, leaves = case.leaves()
        w = [x.float() for x in weights(64)]
        loss, stats = fused_token_loss(combine, *policy.positional, *w, **policy.bias)
        return [*stats, *gradients(loss, leaves)]

    first = once()
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True))


def test_an_error_in_a_worker_reaches_the_caller_and_gives_torch_its_threads_back(threads):
    with Workers(threads) as pool, pytest.raises(ZeroDivisionError):
        pool.run(lambda worker: 1 / (worker + 1 - threads))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1 / 3, 1e-3, 65536.0])
def test_a_16_bit_gradient_is_rounded_once_after_the_upstream_scalar(dtype, upstream, monkeypatch):
    """65536 is where GradScaler begins, and no float16; 1/3 is no bfloat16."""
    monkeypatch.setattr(functions, "_ROUNDED_ROWS", 32)
    case, small = make().to(dtype), weights(29) / 1e5  # near the smallest float16
    truth, leaves = case.to(torch.float64).leaves()
    expected = gradients(combine(naive(truth), *small) * upstream, leaves)
    policy, leaves = case.leaves()
    loss, _ = fused_token_loss(combine, *policy.positional, *small, **policy.bias)
    rounding = torch.finfo(dtype).eps / 2 + 2e-5  # and that of float32 sums
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_close(
        gradients(loss * upstream, leaves), expected, rounding, smallest + 2e-10 * upstream
    )
