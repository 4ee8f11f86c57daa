"""Threads for products and element-wise work."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Self, TypeVar

import torch

T = TypeVar("T")
# Of what is left of a product, a worker takes this part of its even share, within these columns.
_PIECE = 0.4
_PIECE_COLUMNS = (2048, 8192)


class Workers:
    """So many threads, the caller's among them, each of which runs torch's operations alone.

    With one, torch splits operations as it likes. So it does with matrix products, unless the
    workers are there to divide them too: then torch has one thread for all that happens between
    their parts as well, but for `torch_threads`. Its own threads spin for some milliseconds after
    an operation, on the cores that the workers' next parts are to start on.

    The numbers of threads in torch are partly the process's: a thread of the program's own whose
    first operation falls into this time computes with one thread from then on, until it calls
    torch.set_num_threads itself.
    """

    def __init__(self, count: int, *, divide_products: bool = False):
        self.count, self.parts = count, count if divide_products else 1
        self.pool = ThreadPoolExecutor(count - 1) if count > 1 else None

    def __enter__(self) -> Self:
        if self.pool is not None:
            started = threading.Barrier(self.count)
            for _ in range(1, self.count):
                self.pool.submit(self._start, started)
            started.wait()
            torch.set_num_threads(self.count if self.parts == 1 else 1)
        return self

    @staticmethod
    def _start(started: threading.Barrier) -> None:
        # A thread's first operation gives it the process's number of threads, whatever was set for
        # it before; asking for the number counts as one.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.count)

    @contextmanager
    def torch_threads(self) -> Iterator[None]:
        """For operations that torch is to split over its threads, ours or the caller's."""
        before = torch.get_num_threads()
        torch.set_num_threads(max(before, self.count))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What work(0), ..., work(count − 1) return, run at the same time."""
        if self.pool is None:
            return [work(0)]
        inference = torch.is_inference_mode_enabled()

        def in_callers_mode(worker: int) -> T:  # autograd's modes belong to each thread
            with torch.inference_mode(inference), torch.no_grad():
                return work(worker)

        # OpenMP's number of threads is each thread's, but MKL's is the process's.
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        others = [self.pool.submit(in_callers_mode, worker) for worker in range(1, self.count)]
        try:
            first = work(0)
        finally:
            wait(others)
            torch.set_num_threads(before)
        return [first, *(other.result() for other in others)]

    def multiply(self, work: Callable[[int], None]) -> None:
        """Run work(0), ..., work(parts − 1) at the same time."""
        if self.parts == 1:
            work(0)
        else:
            self.run(work)

    def share(self, worker: int, n: int) -> slice:
        """A worker's part of n things."""
        return slice(n * worker // self.count, n * (worker + 1) // self.count)

    def pieces(self, n: int) -> list[slice]:
        """Parts of a product's n columns, for all workers to take from until none is left.

        Large ones first, which are faster; small ones last, so that nobody waits long for the rest.
        """
        if self.parts == 1:
            return [slice(0, n)]
        pieces, start = list[slice](), 0
        while start < n:
            width = int(_PIECE * (n - start) / self.parts)
            width = min(max(width, _PIECE_COLUMNS[0]), _PIECE_COLUMNS[1])
            pieces.append(slice(start, min(start + width, n)))
            start += width
        return pieces


class Shared(Iterator[T]):
    """An iterator for several threads: each item goes to one of them.

    A thread that something else slows down then leaves more to the others.
    """

    def __init__(self, items: Iterable[T]):
        self.items, self.lock = iter(items), threading.Lock()

    def __next__(self) -> T:
        with self.lock:
            return next(self.items)
