"""Threads for element-wise work on cache-sized blocks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch


class Workers:
    """As many threads as torch computes with, each of which runs its operations alone.

    Left to itself torch splits every operation over its threads and waits for all of them. On
    blocks that fit a cache this costs more than it gains, and on a busy machine each wait may last
    a time slice of the scheduler. Here a thread takes whole blocks and there is one wait per sweep
    over a chunk. Matrix products stay with torch's own threads.
    """

    def __init__(self, device: torch.device):
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
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
