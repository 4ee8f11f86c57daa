"""What float32 products depend on for the whole process: their precision, OpenBLAS's threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlkl.kl.fused import openblas

_CPU = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] (dynamic)
_GPU = torch.backends.cuda.matmul
_NOT_ROUNDED = {"none", "ieee"}


class _Sections:
    """Parts of several threads' work: together where they agree on a precision, else in turn."""

    def __init__(self) -> None:
        self.turn, self.left = threading.Lock(), threading.Condition()
        self.inside = 0
        self.cpu = self.cpu_before = self.gpu_before = ""
        self.limit: Any = None

    def enter(self, cpu: str) -> None:
        """Wait until nobody works in another precision than this, and set it."""
        with self.turn, self.left:  # who waits keeps the turn: nobody overtakes him for ever
            self.left.wait_for(lambda: self.inside == 0 or self.cpu == cpu)
            if self.inside == 0:
                self.cpu, self.cpu_before, self.gpu_before = cpu, _set(_CPU, cpu), _set(_GPU)
                if (blas := openblas.openblas()) is not None:
                    self.limit = blas.threads.limit(limits=1)
            self.inside += 1

    def leave(self) -> None:
        """The last one out restores what was set."""
        with self.left:
            self.inside -= 1
            if self.inside == 0:
                _restore(_CPU, self.cpu_before)
                _restore(_GPU, self.gpu_before)
                if self.limit is not None:
                    self.limit.restore_original_limits()
                self.left.notify()


_sections = _Sections()


@contextmanager
def gemm_precision(dtype: torch.dtype | None) -> Iterator[None]:
    """Float32 products as IEEE has them, or with factors that oneDNN rounds to bfloat16 (CPU).

    Whatever `torch.set_float32_matmul_precision` says; sums and output stay float32. (torch.mm of
    bfloat16 tensors would round its output as well, which drowns a small KL.) CPUs without bfloat16
    arithmetic ignore the setting.

    OpenBLAS, where it multiplies, has one thread meanwhile: the one that calls it.

    It is the process's: set around what a call's threads do together, never in one of them, and
    never in two ways at once: a thread that wants the other precision waits. Products outside,
    of threads that do not call this library, are rounded as well while a bfloat16 section lasts.
    """
    _sections.enter("bf16" if dtype == torch.bfloat16 else "ieee")
    try:
        yield
    finally:
        _sections.leave()


def _set(backend, precision: str = "ieee") -> str:
    """What was set before."""
    before = backend.fp32_precision
    if before != precision and not {before, precision} <= _NOT_ROUNDED:
        backend.fp32_precision = precision
    return before


def _restore(backend, before: str) -> None:
    if backend.fp32_precision != before:
        backend.fp32_precision = "none"  # inherited from a more general setting, or
        if backend.fp32_precision != before:
            backend.fp32_precision = before
