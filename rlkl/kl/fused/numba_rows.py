"""The passes over a chunk's logits as loops that Numba compiles.

Torch makes sixteen element-wise passes for the same sums; here a few loops do, over runs of logits
that fit the nearest cache. Imported only where Numba is installed; float32 on a CPU only;
everything that is per token stays in `engine`.

Sums are taken in float32 over a few thousand logits and in float64 over these. eˣ = 2ⁿ eʳ with
|r| ≤ log(2)/2, and eʳ = 1 + r + r² q(r), so that

    φ(x) = eˣ − 1 − x = (2ⁿ − 1) + (2ⁿ r − x) + 2ⁿ r² q(r)

keeps all its digits near 0, where n = 0 and r = x.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

# Float32 sums run over so many logits before they are added in float64.
_RUN = 4096
_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_INFINITY = np.float32(np.inf)
# The key (see below) of the lowest finite number: a maximum is that where every logit is −∞.
_LOWEST_KEY = np.int32(-(2**31) + 2**23)
# Where eˣ leaves float32's normal numbers.
_MIN_X, _MAX_X = np.float32(-87), np.float32(88)
_LOG2_E = np.float32(1.4426950408889634)
# log 2 in two parts: n times the first is exact.
_LOG2_HIGH, _LOG2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_Q = tuple(np.float32(1 / k) for k in (2, 6, 24, 120, 720, 5040))
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5 = _Q
_SMALLEST = np.finfo(np.float32).tiny
_SQRT_HALF = np.float32(0.5**0.5)
# log(1 + x) − x + x²/2 over x³, on [√½ − 1, √2 − 1] (Cephes' logf).
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (
    np.float32(c)
    for c in (
        3.3333331174e-1,
        -2.4999993993e-1,
        2.0000714765e-1,
        -1.6668057665e-1,
        1.4249322787e-1,
        -1.2420140846e-1,
        1.1676998740e-1,
        -1.1514610310e-1,
        7.0376836292e-2,
    )
)
# Sums may be taken in any order, which lets them be taken eight at a time.
_ANY_ORDER = {"reassoc", "contract", "nsz"}
_F32, _ARRAY = types.float32, types.float32[::1]


def _compile(signature: Any = None, **options: Any) -> Callable[[Any], Any]:
    """Numba's decorator; what it compiles is kept for later processes where there is room.

    A function whose sums others call has its signature: it is then compiled or loaded before them.
    LLVM optimises the copy in a caller once more, to another order of the sum, and of two functions
    of one name the process runs the first it meets; without, that was the function itself where it
    had just been compiled, and the caller's copy in every later process.
    """

    def decorate(function: Any) -> Any:
        try:
            return njit(signature, cache=True, nogil=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's may be written
            return njit(signature, nogil=True, **options)(function)

    return decorate


@intrinsic
def _two_to(typing_context: Any, n: Any) -> Any:
    """2ⁿ of a whole float32 in [−126, 127]."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], _INT), ir.Constant(_INT, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_INT, 23)), _FLOAT)

    return types.float32(types.float32), build


@intrinsic
def _exponent(typing_context: Any, x: Any) -> Any:
    """The n of x = 2ⁿ m with √½ ≤ m < √2, for a normal x > 0."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        root = ir.Constant(_INT, int(_SQRT_HALF.view(np.int32)))
        above = builder.sub(builder.bitcast(args[0], _INT), root)
        return builder.sitofp(builder.ashr(above, ir.Constant(_INT, 23)), _FLOAT)

    return types.float32(types.float32), build


@intrinsic
def _whole_vectors(typing_context: Any) -> Any:
    """Let the loops of this function use vectors as long as the CPU has them.

    And keep it apart: inlined, its sums could be in another order for each caller. LLVM halves
    AVX-512's vectors where long ones may slow the clock; the matrix products on either side use
    them anyway.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite knows no name for it, but prints what is in its set.
        if isinstance(attributes := builder.function.attributes, set):
            set.add(attributes, '"prefer-vector-width"="512"')
            attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), build


def _flip(builder: Any, bits: Any) -> Any:
    """Order the bits of floats as integers, or the reverse: the magnitude of negatives flipped."""
    sign = builder.ashr(bits, ir.Constant(_INT, 31))
    return builder.xor(bits, builder.and_(sign, ir.Constant(_INT, 2**31 - 1)))


@intrinsic
def _larger_key(typing_context: Any, key: Any, x: Any) -> Any:
    """The larger of a key and the key of x; a maximum of integers is taken eight at a time."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        other = _flip(builder, builder.bitcast(args[1], _INT))
        return builder.select(builder.icmp_signed(">", other, args[0]), other, args[0])

    return types.int32(types.int32, types.float32), build


@intrinsic
def _of_key(typing_context: Any, key: Any) -> Any:
    """The float of a key."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(_flip(builder, args[0]), _FLOAT)

    return types.float32(types.int32), build


@_compile(fastmath={"contract"})
def _exp_parts(x):
    """(2ⁿ, r, r² q(r)) of x = n log 2 + r, x ≥ −87; n stays in float32's range; NaN stays NaN."""
    x = _MIN_X if x < _MIN_X else x
    inside = x if x < _MAX_X else _MAX_X
    n = np.floor(inside * _LOG2_E + _HALF)
    r = (x - n * _LOG2_HIGH) - n * _LOG2_LOW
    q = ((((_Q5 * r + _Q4) * r + _Q3) * r + _Q2) * r + _Q1) * r + _Q0
    return _two_to(n), r, r * r * q


@_compile(fastmath={"contract"})
def _exp(x):
    two, r, rest = _exp_parts(x)
    return _ZERO if x < _MIN_X else two * (r + rest) + two


@_compile(fastmath={"contract"})
def _phi(x):
    two, r, rest = _exp_parts(x)
    return (two - _ONE) + (two * r - x) + two * rest


@_compile(fastmath={"contract"})
def _log(x):
    """Log of a normal x, 0 < x ≤ 1."""
    n = _exponent(x)
    f = x * _two_to(-n) - _ONE
    c = ((_L8 * f + _L7) * f + _L6) * f + _L5
    c = ((((c * f + _L4) * f + _L3) * f + _L2) * f + _L1) * f + _L0
    tail = c * f * f * f + (n * _LOG2_LOW - _HALF * f * f)
    return (f + tail) + n * _LOG2_HIGH


@_compile(_F32(_ARRAY))
def _maximum(a):
    _whole_vectors()
    key = _LOWEST_KEY
    for i in range(a.shape[0]):
        key = _larger_key(key, a[i])
    return _of_key(key)


@_compile(types.UniTuple(_F32, 2)(_ARRAY, _F32), fastmath=_ANY_ORDER)
def _policy_sums(a, peak):
    """Logits a to p; Σ p and Σ p (a − peak)."""
    _whole_vectors()
    p_sum, a_sum = _ZERO, _ZERO
    for i in range(a.shape[0]):
        x = a[i] - peak
        p = _exp(x)
        p_sum += p
        a_sum += p * (_MIN_X if x < _MIN_X else x)  # p = 0 below; and 0 · ∞ is NaN
        a[i] = p
    return p_sum, a_sum


@_compile(types.none(_ARRAY, _ARRAY))
def _subtract(b, a):
    """Differences b − a to b; 0 where both are −∞."""
    _whole_vectors()
    for i in range(b.shape[0]):
        b[i] = _ZERO if b[i] == a[i] else b[i] - a[i]


@_compile(_F32(_ARRAY, _ARRAY), fastmath=_ANY_ORDER)
def _dot(p, t):
    _whole_vectors()
    total = _ZERO
    for i in range(p.shape[0]):
        total += p[i] * t[i]
    return total


@_compile(types.UniTuple(_F32, 3)(_ARRAY, _ARRAY, _F32), fastmath=_ANY_ORDER)
def _phi_sums(p, t, mean):
    """Differences b − a to t, less its mean; Σ p φ(t), Σ p t and max t."""
    _whole_vectors()
    phi_sum, t_sum, key = _ZERO, _ZERO, _LOWEST_KEY
    for i in range(p.shape[0]):
        centred = t[i] - mean
        phi_sum += p[i] * _phi(centred)
        t_sum += p[i] * centred
        key = _larger_key(key, centred)
        t[i] = centred
    return phi_sum, t_sum, _of_key(key)


@_compile(_F32(_ARRAY, _ARRAY, _F32), fastmath=_ANY_ORDER)
def _centre(p, t, mean):
    """Differences b − a to t, less its mean; Σ p t."""
    _whole_vectors()
    t_sum = _ZERO
    for i in range(p.shape[0]):
        centred = t[i] - mean
        t_sum += p[i] * centred
        t[i] = centred
    return t_sum


@_compile()
def _read(
    p, t, stride, vocab, peaks, p_sums, a_sums, t_means, t_maxima, t_sums, phi_sums, joint, with_phi
):
    for row in range(peaks.shape[0]):
        a = p[row * stride : row * stride + vocab]
        b = t[row * stride : row * stride + vocab]
        peak = _maximum(a)
        p_sum, a_sum, t_sum = 0.0, 0.0, 0.0
        for start in range(0, vocab, _RUN):
            a_run, b_run = a[start : start + _RUN], b[start : start + _RUN]
            if joint:
                _subtract(b_run, a_run)
            # With and without a reference by the same machine code, to the last bit.
            sums = _policy_sums(a_run, peak)
            p_sum += sums[0]
            a_sum += sums[1]
            if joint:
                t_sum += _dot(a_run, b_run)
        peaks[row], p_sums[row], a_sums[row] = peak, p_sum, a_sum
        if not joint:
            continue
        mean = np.float32(t_sum / max(p_sum, 1.0))  # the largest p is 1, if any token is allowed
        t_means[row] = mean
        # The mean is not finite where one model alone forbids a token: such rows are read anew.
        t_max = -_INFINITY if mean - mean == _ZERO else _INFINITY
        phi_sum, t_sum = 0.0, 0.0
        for start in range(0, vocab, _RUN):
            a_run, b_run = a[start : start + _RUN], b[start : start + _RUN]
            if with_phi:
                more = _phi_sums(a_run, b_run, mean)
                phi_sum += more[0]
                t_sum += more[1]
                t_max = max(t_max, more[2])
            else:
                t_sum += _centre(a_run, b_run, mean)
        t_maxima[row], t_sums[row] = t_max, t_sum
        if with_phi:
            phi_sums[row] = phi_sum


@_compile(fastmath={"contract"})
def _weigh(p, constant):
    for i in range(p.shape[0]):
        p[i] *= constant


@_compile(fastmath={"contract"})
def _weigh_t(p, t, constant, t_factor):
    for i in range(p.shape[0]):
        p[i] *= t[i] * t_factor + constant


@_compile(fastmath={"contract"})
def _weigh_log(p, t, constant, t_factor, log_factor):
    for i in range(p.shape[0]):
        likely = p[i] if p[i] > _SMALLEST else _SMALLEST
        p[i] *= _log(likely) * log_factor + (t[i] * t_factor + constant)


@_compile(fastmath={"contract"})
def _multiply(g, slope):
    for i in range(g.shape[0]):
        g[i] *= slope[i]


@_compile()
def _gradient(
    p, t, slope, stride, vocab, tokens, constants, t_factors, log_factors, token_gradients
):
    for row in range(tokens.shape[0]):
        first = row * stride
        g = p[first : first + vocab]
        constant = constants[row]
        if log_factors is not None:
            # Without a reference t_factor is 0, and p stands for the finite t there is not.
            t_row = g if t is None else t[first : first + vocab]
            t_factor = _ZERO if t is None else t_factors[row]
            _weigh_log(g, t_row, constant, t_factor, log_factors[row])
        elif t is not None:
            _weigh_t(g, t[first : first + vocab], constant, t_factors[row])
        else:
            _weigh(g, constant)
        if token_gradients is not None:
            g[tokens[row]] += token_gradients[row]
        if slope is not None:
            _multiply(g, slope[first : first + vocab])


def _flat(x: Tensor | None) -> Any:
    """All from the first element of a matrix to its last, as one contiguous array."""
    if x is None:
        return None
    size = (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    return x.as_strided((size,), (1,)).numpy()


def _column(x: Tensor | None) -> Any:
    return None if x is None else x.contiguous().view(-1).numpy()


def read_rows(p: Tensor, t: Tensor | None, rows: dict[str, Tensor], *, with_phi: bool) -> None:
    """Logits [n, V] of policy and reference -> p, t and the sums per row [n, 1], all in place.

    Without `with_phi` Σ p φ(t) is left out, and t_max only says whether the mean of t is finite.
    """
    names = ("peak", "p_sum", "a_sum", "t_mean", "t_max", "t_sum", "phi_sum")
    sums = (rows[name].view(-1).numpy() for name in names)
    joint = t is not None
    b = _flat(t if joint else p)  # not read without a reference
    _read(_flat(p), b, p.stride(0), p.shape[1], *sums, joint, with_phi)


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
    columns = (tokens, constant, t_factor, log_factor, token_gradient)
    _gradient(_flat(p), _flat(t), _flat(slope), p.stride(0), p.shape[1], *map(_column, columns))
