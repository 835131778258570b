# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Runs functions on several ranks of this machine: one fresh interpreter imports everything once and forks them."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def main(folder: Path, *names: str):
    """Runs the named scenarios, by default the fast ones, one after the other; stops at a rank that fails or hangs.

    A scenario is a function of the folder that rank by rank returns what it found, and a number of ranks.
    """
    import data_parallel_ranks
    import tensor_parallel_ranks
    import two_devices

    torch.set_num_threads(1)
    scenarios = [*two_devices.SCENARIOS, *tensor_parallel_ranks.SCENARIOS, *data_parallel_ranks.SCENARIOS]
    if names:
        scenarios = [scenario for scenario in tensor_parallel_ranks.SLOW_SCENARIOS if scenario[0].__name__ in names]
    for function, world_size in scenarios:
        exit_codes = fork_ranks(function, world_size, folder)
        wanted = [getattr(function, "exit_codes", {}).get(rank, 0) for rank in range(world_size)]
        if exit_codes != wanted:
            sys.exit(f"{function.__name__}: the ranks ended with {exit_codes}")


def fork_ranks(function: Callable[[Path], dict], world_size: int, folder: Path, timeout: int = 150) -> list[int]:
    """Exit codes of the ranks; `None` for one that had to be killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_run_rank, args=(function, rank, world_size, port, folder))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    exit_codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return exit_codes


def _run_rank(function, rank, world_size, port, folder):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 0
    try:
        torch.save(function(folder), folder / f"{function.__name__}.{rank}.found.pt")
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # not through the parent's exit handlers


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
