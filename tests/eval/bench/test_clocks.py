# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import time

import pytest
import torch

from modeling_attnres.eval.bench.clocks import GpuClock, ProcessorClock, clock_for


class FakeCuda:
    """A `torch.cuda` whose stream takes 20 ms per unit of `work`, and whose memory is a number."""

    def __init__(self):
        self.log, self.now, self.allocated, self.peak = [], 0.0, 100, 0

    def Event(self, enable_timing: bool):
        assert enable_timing
        return _Event(self)

    def synchronize(self):
        self.log.append("synchronize")

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def empty_cache(self):
        self.log.append("empty_cache")

    def work(self):
        self.log.append("work")
        self.now += 20.0
        self.peak = max(self.peak, self.allocated + 50)


class _Event:
    def __init__(self, cuda: FakeCuda):
        self.cuda, self.at = cuda, None

    def record(self):
        self.cuda.log.append("record")
        self.at = self.cuda.now

    def elapsed_time(self, other: "_Event") -> float:
        return other.at - self.at  # milliseconds


def test_gpu_is_timed_between_events_on_an_idle_device():
    cuda = FakeCuda()

    seconds, wall = GpuClock(cuda).measure(cuda.work)

    assert cuda.log == ["synchronize", "record", "work", "record", "synchronize"]
    assert seconds == pytest.approx(0.02)
    assert 0 < wall < 0.01


def test_gpu_memory_is_what_an_action_adds():
    cuda = FakeCuda()
    clock = GpuClock(cuda)

    assert clock.peak_bytes(cuda.work) == 50
    clock.free()
    assert cuda.log[-1] == "empty_cache"


def test_processor_time_leaves_out_waiting():
    cpu, wall = ProcessorClock().measure(lambda: time.sleep(0.05))

    assert wall >= 0.05
    assert cpu < 0.04


def test_processor_memory_is_what_an_action_allocates():
    assert ProcessorClock().peak_bytes(lambda: torch.ones(1000)) == 4000


def test_every_device_has_its_clock():
    assert isinstance(clock_for("cpu"), ProcessorClock)
    assert clock_for(torch.device("cuda:1")).cuda is torch.cuda
    with pytest.raises(ValueError, match="`device` must be 'cpu' or 'cuda', got 'meta'"):
        clock_for("meta")
