# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several processes of this machine, joined by gloo: one process stands for one device."""

import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


COMMUNICATION_TIMEOUT = 60.0  # seconds

# The server imports the heavy modules once, and every process of every test is forked off it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.pipelining", "modeling_attnres.parallel.generation"])


def run_ranks(
    function,
    num_ranks: int,
    folder: Path,
    *args,
    timeout: float = 240,
    may_fail: bool = False,
    communication_timeout: float = COMMUNICATION_TIMEOUT,
) -> list:
    """Calls `function(mesh, *args)` on every rank of a one-dimensional mesh.

    Args:
        function: of a module that can be imported by name, not of a test.
        folder: an empty one; processes meet there and leave their results.
        timeout: seconds after which the processes are killed and the test fails.
        may_fail: whether a rank may end without a result, which is then `None`.
        communication_timeout: seconds that a rank waits for another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        _context.Process(target=_run_rank, args=(function, rank, num_ranks, str(folder), communication_timeout, args))
        for rank in range(num_ranks)
    ]
    deadline = time.monotonic() + timeout
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of {num_ranks} processes still ran after {timeout} s"
    results = []
    for rank, process in enumerate(processes):
        failure, result = folder / f"failure{rank}", folder / f"result{rank}"
        assert may_fail or process.exitcode == 0, failure.read_text() if failure.exists() else process.exitcode
        results.append(torch.load(result, weights_only=False) if result.exists() else None)
    return results


def _run_rank(function, rank: int, num_ranks: int, folder: str, communication_timeout: float, args: tuple):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=communication_timeout),
        )
        torch.save(function(init_device_mesh("cpu", (num_ranks,)), *args), f"{folder}/result{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/failure{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
