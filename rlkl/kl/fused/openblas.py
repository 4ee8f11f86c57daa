"""Float32 products of one thread by OpenBLAS, on CPUs where it is faster than torch's.

PyPI's torch multiplies with MKL, which takes half as long again on AMD's Zen 4 where a factor is
transposed, as a head is (recipes/README.md has figures). SciPy, a dependency, brings OpenBLAS.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NEEDED = ("llvmlite", "numba", "scipy", "threadpoolctl")


class OpenBlas(NamedTuple):
    """A library that is loaded."""

    sgemm: Callable[..., None]
    """BLAS's, as Fortran declares it."""
    threads: Any
    """threadpoolctl's controller of its threads."""

    def addmm(self, out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float) -> None:
        """Out = alpha a b + beta out, for matrices of float32 on the CPU; out's rows are whole."""
        # In BLAS columns follow upon each other: to it these are outᵀ = alpha bᵀ aᵀ + beta outᵀ.
        (a, turn_a, stride_a), (b, turn_b, stride_b) = _operand(a), _operand(b)
        n, m = out.shape
        sizes = (ctypes.c_int(x) for x in (m, n, a.shape[1]))
        self.sgemm(
            turn_b,
            turn_a,
            *map(ctypes.byref, sizes),
            ctypes.byref(ctypes.c_float(alpha)),
            b.data_ptr(),
            ctypes.byref(ctypes.c_int(stride_b)),
            a.data_ptr(),
            ctypes.byref(ctypes.c_int(stride_a)),
            ctypes.byref(ctypes.c_float(beta)),
            out.data_ptr(),
            ctypes.byref(ctypes.c_int(max(out.stride(0), m))),
        )


def _rows_are_whole(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _operand(x: Tensor) -> tuple[Tensor, bytes, int]:
    """A matrix or a copy that BLAS can read, whether it must be turned, and its stride."""
    if _rows_are_whole(x.t()) and not _rows_are_whole(x):
        return x, b"T", x.stride(1)
    x = x if _rows_are_whole(x) else x.contiguous()
    return x, b"N", max(x.stride(0), x.shape[1])


def load_openblas() -> OpenBlas | None:
    """SciPy's OpenBLAS; None where SciPy has another library, or something is not installed."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        return None
    import scipy
    from numba.extending import get_cython_function_address
    from threadpoolctl import ThreadpoolController

    built: Any = scipy.show_config(mode="dicts")
    if "openblas" not in built["Build Dependencies"]["blas"]["name"]:
        return None
    address = get_cython_function_address("scipy.linalg.cython_blas", "sgemm")
    sgemm = ctypes.CFUNCTYPE(None, *[ctypes.c_char_p] * 2, *[ctypes.c_void_p] * 11)(address)
    return OpenBlas(sgemm, ThreadpoolController().select(internal_api="openblas"))


@functools.cache
def openblas() -> OpenBlas | None:
    """The library to multiply with in place of torch's; None where torch's is as good."""
    if not torch.backends.mkl.is_available() or importlib.util.find_spec("llvmlite") is None:
        return None
    from llvmlite import binding

    # Measured on Zen 4; AMD's CPUs before have no AVX-512.
    name, features = binding.get_host_cpu_name(), binding.get_host_cpu_features()
    return load_openblas() if name.startswith("znver") and features.get("avx512f") else None


def addmm(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    rounded: bool = False,
) -> None:
    """Out = alpha a b + beta out, within `gemm_precision`; `out` is not read where beta = 0.

    `rounded` says that oneDNN is to round the factors, which is left to torch.
    """
    if out.dtype == torch.float32 and out.device.type == "cpu" and not rounded:
        blas = openblas() if torch.get_num_threads() == 1 and a.numel() and b.numel() else None
        if blas is not None and _rows_are_whole(out):
            blas.addmm(out, a, b, alpha=alpha, beta=beta)
            return
    if beta == 0 and alpha == 1:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b, alpha=alpha, beta=beta)
