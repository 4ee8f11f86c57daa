"""Threads for element-wise work."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch


class Workers:
    """So many threads for passes over logits; in each, torch's operations run alone.

    With one, everything stays in the caller's thread, and torch splits operations as it likes.
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
            # OpenMP's setting is the thread's, but MKL's is the process's: give it back.
            torch.set_num_threads(self.count)
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

    def run(self, work: Callable[[int], None]) -> None:
        """Run work(0), ..., work(count − 1) at the same time and wait for them."""
        if self.pool is None:
            work(0)
            return
        inference = torch.is_inference_mode_enabled()

        def in_callers_mode(worker: int) -> None:  # autograd's modes belong to each thread
            with torch.inference_mode(inference), torch.no_grad():
                work(worker)

        for done in [self.pool.submit(in_callers_mode, worker) for worker in range(self.count)]:
            done.result()
