"""The passes over a chunk's logits as Triton kernels, one program per row.

The products stay with cuBLAS, in float32. Imported only where Triton is installed and the tensors
are on a GPU (or TRITON_INTERPRET=1 in tests); everything that is per token stays in `engine`.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton is not everywhere, and its kernels are called as kernel[grid].)

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _exp_remainder(t):
    """Eᵗ − 1 − t with all its digits: by its series near 0, where the difference has none."""
    series = t * 0.0 + 1.0
    for i in tl.static_range(12):
        series = 1.0 + series * t / (14 - i)
    return tl.where(tl.abs(t) < 0.5, 0.5 * t * t * series, tl.exp(t) - 1.0 - t)


@triton.jit
def _difference(b, a):
    """Difference b − a; 0 where both are −∞."""
    return tl.where(b == a, 0.0, b - a)


@triton.jit
def _read_row(
    p_ptr,
    t_ptr,
    stride,
    vocab,
    peak_ptr,
    p_sum_ptr,
    a_sum_ptr,
    t_mean_ptr,
    t_max_ptr,
    t_sum_ptr,
    phi_sum_ptr,
    HAS_REF: tl.constexpr,
    WITH_PHI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start_of_row = row.to(tl.int64) * stride
    p_row, t_row = p_ptr + start_of_row, t_ptr + start_of_row
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], dtype=p_ptr.dtype.element_ty)

    peaks = zeros - float("inf")
    for start in range(0, vocab, BLOCK):
        real = start + lanes < vocab
        peaks = tl.maximum(peaks, tl.load(p_row + start + lanes, mask=real, other=-float("inf")))
    peak = tl.max(peaks, axis=0)

    p_sums, a_sums, t_sums = zeros, zeros, zeros
    for start in range(0, vocab, BLOCK):
        real = start + lanes < vocab
        a = tl.load(p_row + start + lanes, mask=real, other=0.0)
        p = tl.where(real, tl.exp(a - peak), 0.0)
        p_sums += p
        a_sums += tl.where(real & (p > 0.0), p * (a - peak), 0.0)
        if HAS_REF:
            b = tl.load(t_row + start + lanes, mask=real, other=0.0)
            t_sums += tl.where(real, p * _difference(b, a), 0.0)
    p_sum = tl.sum(p_sums, axis=0)
    mean = tl.sum(t_sums, axis=0) / p_sum

    phi_sums, t_sums, t_maxima = zeros, zeros, zeros - float("inf")
    for start in range(0, vocab, BLOCK):
        real = start + lanes < vocab
        a = tl.load(p_row + start + lanes, mask=real, other=0.0)
        p = tl.exp(a - peak)
        if HAS_REF:
            b = tl.load(t_row + start + lanes, mask=real, other=0.0)
            t = _difference(b, a) - mean
            t_sums += tl.where(real, p * t, 0.0)
            if WITH_PHI:
                phi_sums += tl.where(real, p * _exp_remainder(t), 0.0)
                t_maxima = tl.maximum(t_maxima, tl.where(real, t, -float("inf")))
            tl.store(t_row + start + lanes, t, mask=real)
        tl.store(p_row + start + lanes, p, mask=real)

    tl.store(peak_ptr + row, peak)
    tl.store(p_sum_ptr + row, p_sum)
    tl.store(a_sum_ptr + row, tl.sum(a_sums, axis=0))
    if HAS_REF:
        tl.store(t_mean_ptr + row, mean)
        # The mean is not finite where one model alone forbids a token: such rows are read anew.
        t_max = tl.where(mean - mean == 0.0, tl.max(t_maxima, axis=0), float("inf"))
        tl.store(t_max_ptr + row, t_max)
        tl.store(t_sum_ptr + row, tl.sum(t_sums, axis=0))
        tl.store(phi_sum_ptr + row, tl.sum(phi_sums, axis=0))


@triton.jit
def _gradient_row(
    p_ptr,
    t_ptr,
    slope_ptr,
    stride,
    vocab,
    tokens_ptr,
    constant_ptr,
    t_factor_ptr,
    log_factor_ptr,
    token_gradient_ptr,
    smallest,
    HAS_T: tl.constexpr,
    HAS_LOG: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start_of_row = row.to(tl.int64) * stride
    constant, token = tl.load(constant_ptr + row), tl.load(tokens_ptr + row)
    token_gradient = tl.load(token_gradient_ptr + row)
    for start in range(0, vocab, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        real = lanes < vocab
        p = tl.load(p_ptr + start_of_row + lanes, mask=real, other=1.0)
        factor = constant + p * 0.0
        if HAS_T:
            t = tl.load(t_ptr + start_of_row + lanes, mask=real, other=0.0)
            factor += t * tl.load(t_factor_ptr + row)
        if HAS_LOG:
            factor += tl.log(tl.maximum(p, smallest)) * tl.load(log_factor_ptr + row)
        gradient = p * factor + tl.where(lanes == token, token_gradient, 0.0)
        if HAS_SLOPE:
            gradient *= tl.load(slope_ptr + start_of_row + lanes, mask=real, other=0.0)
        tl.store(p_ptr + start_of_row + lanes, gradient, mask=real)


def read_rows(p: Tensor, t: Tensor | None, rows: dict[str, Tensor], *, with_phi: bool) -> None:
    """Logits [n, V] of policy and reference -> p, t and the sums per row [n, 1], all in place.

    Without `with_phi` Σ p φ(t) is left out, and t_max only says whether the mean of t is finite.
    """
    names = ("peak", "p_sum", "a_sum", "t_mean", "t_max", "t_sum", "phi_sum")
    n, vocab = p.shape
    _read_row[(n,)](
        p,
        p if t is None else t,
        p.stride(0),
        vocab,
        *(rows[name] for name in names),
        HAS_REF=t is not None,
        WITH_PHI=with_phi,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
    )


def gradient_rows(
    p: Tensor,
    t: Tensor | None,
    slope: Tensor | None,
    tokens: Tensor,
    constant: Tensor,
    t_factor: Tensor | None,
    log_factor: Tensor | None,
    token_gradient: Tensor | None,
) -> None:
    """(p ⊙ (constant + t_factor t + log_factor log p) + onehot token_gradient) ⊙ slope, in p."""
    n, vocab = p.shape

    def or_constant(x: Tensor | None) -> Tensor:  # something to point at; it is not read
        return constant if x is None else x.contiguous()

    if token_gradient is None:
        token_gradient = torch.zeros_like(constant)
    _gradient_row[(n,)](
        p,
        p if t is None else t,
        p if slope is None else slope,
        p.stride(0),
        vocab,
        tokens.contiguous(),
        constant,
        or_constant(t_factor),
        or_constant(log_factor),
        token_gradient.contiguous(),
        torch.finfo(p.dtype).tiny,
        HAS_T=t_factor is not None,
        HAS_LOG=log_factor is not None,
        HAS_SLOPE=slope is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
    )
