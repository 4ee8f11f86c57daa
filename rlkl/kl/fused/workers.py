"""Threads for products and element-wise work."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import torch

T = TypeVar("T")


class Workers:
    """So many threads, each of which runs torch's operations alone.

    With one, everything stays in the caller's thread, and torch splits operations as it likes.
    With more, the caller's thread has torch to itself too until it leaves the context.
    """

    def __init__(self, count: int):
        self.count = count
        self.pool = ThreadPoolExecutor(count) if count > 1 else None

    def __enter__(self) -> Self:
        if self.pool is not None:
            started = threading.Barrier(self.count + 1)
            for _ in range(self.count):
                self.pool.submit(self._start, started)
            started.wait()
            # OpenMP's number of threads is each thread's, but MKL's is the process's.
            torch.set_num_threads(1)
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

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What work(0), ..., work(count − 1) return, run at the same time."""
        if self.pool is None:
            return [work(0)]
        inference = torch.is_inference_mode_enabled()

        def in_callers_mode(worker: int) -> T:  # autograd's modes belong to each thread
            with torch.inference_mode(inference), torch.no_grad():
                return work(worker)

        running = [self.pool.submit(in_callers_mode, worker) for worker in range(self.count)]
        return [done.result() for done in running]

    def alone(self, work: Callable[[], T]) -> T:
        """Run what cannot be divided, in the caller's thread with all of torch's threads."""
        if self.pool is None:
            return work()
        torch.set_num_threads(self.count)
        try:
            return work()
        finally:
            torch.set_num_threads(1)

    def share(self, worker: int, n: int) -> slice:
        """A worker's part of n things."""
        return slice(n * worker // self.count, n * (worker + 1) // self.count)
