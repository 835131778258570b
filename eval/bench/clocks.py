# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""How long an action keeps a device busy, and how much memory it takes there at most."""

import time
from collections.abc import Callable
from typing import Any

import torch

from .counting import allocated_bytes


class ProcessorClock:
    """The processor: time of the process, which leaves out waiting, and the clock on the wall."""

    label = "cpu"

    def measure(self, action: Callable[[], object]) -> tuple[float, float]:
        """Runs `action` once; seconds of the process and of the wall."""
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        return time.process_time() - cpu, time.perf_counter() - wall

    def peak_bytes(self, action: Callable[[], object]) -> int:
        """Bytes that `action` has allocated at most, beyond what was there."""
        return allocated_bytes(action)[0]

    def free(self):
        """Gives back memory that is kept for reuse: there is none."""


class GpuClock:
    """A GPU: time between two events on its stream, and the clock on the wall until it has finished.

    Args:
        cuda: `torch.cuda`, or what stands in for it.
    """

    label = "gpu"

    def __init__(self, cuda: Any = torch.cuda):
        self.cuda = cuda

    def measure(self, action: Callable[[], object]) -> tuple[float, float]:
        """Runs `action` once on an idle device; seconds between the events and of the wall."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        action()
        end.record()
        self.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, time.perf_counter() - wall

    def peak_bytes(self, action: Callable[[], object]) -> int:
        """Bytes that `action` has allocated at most, beyond what was there."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        action()
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - before

    def free(self):
        """Gives back memory that is kept for reuse."""
        self.cuda.empty_cache()


def clock_for(device: torch.device | str) -> ProcessorClock | GpuClock:
    """The clock of a device.

    Raises:
        ValueError: for a device that is neither a processor nor a CUDA GPU.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got '{device}'.")
    return ProcessorClock() if kind == "cpu" else GpuClock()
