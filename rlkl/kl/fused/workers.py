"""Threads for element-wise work on cache-sized blocks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

# From this vocabulary on the products outweigh the passes over their results. (Below torch's grain
# of 32,768 a row is summed by one thread: its bits do not depend on how the rows are divided.)
_LARGE_VOCAB = 16_384


class Workers:
    """Threads for passes over a large vocabulary's logits; each runs its operations alone.

    Left to itself torch splits every operation over its threads and waits for all of them. On an
    idle machine that is the fastest way through small logits, but each wait may last a time slice
    of the scheduler on a busy one, and a large vocabulary takes thousands of waits. There a thread
    takes whole blocks and there is one wait per sweep over a chunk; the price is Python's lock
    between them. Compiled passes have no other threads. Matrix products stay with torch's own.
    """

    def __init__(self, device: torch.device, vocab: int, compiled: bool = False):
        many = device.type == "cpu" and (compiled or vocab >= _LARGE_VOCAB)
        self.count = torch.get_num_threads() if many else 1
        self.pool = ThreadPoolExecutor(self.count) if self.count > 1 else None

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
