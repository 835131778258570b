"""Runs functions on several ranks of this machine: one fresh interpreter imports everything once and forks them."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def run_scenarios(script: Path, folder: Path, timeout: int = 240) -> dict[str, list[dict]]:
    """Runs a script that calls [`main`]; returns by scenario what each rank of it found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    found = {}
    for file in sorted(folder.glob("*.found.pt")):  # scenario.rank.found.pt
        found.setdefault(file.name.split(".")[0], []).append(torch.load(file))
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
    return found


def main(*scenarios: tuple[Callable[[Path], dict], int]):
    """Runs each `(function, number of ranks)` after the other; a rank that fails or hangs fails the script."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for function, world_size in scenarios:
        exit_codes = fork_ranks(function, world_size, folder)
        wanted = [getattr(function, "exit_codes", {}).get(rank, 0) for rank in range(world_size)]
        if exit_codes != wanted:
            sys.exit(f"{function.__name__}: the ranks ended with {exit_codes}")


def fork_ranks(function: Callable[[Path], dict], world_size: int, folder: Path, timeout: int = 100) -> list[int]:
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
