# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""vLLM in processes of its own, asked by files, with a time limit."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


WORKER = Path(__file__).parent / "vllm_worker.py"
LINES_SHOWN = 60
# Without them two processes of the same model differ by some 7 % in time, by where their weights happen to lie.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


def environment(**variables: str) -> dict[str, str]:
    """One thread, no hub, 1 GiB of KV cache, and the engine in the process that asks, unless `variables` differ."""
    if importlib.util.find_spec("vllm") is None:
        pytest.fail("tests marked `vllm` run in the environment of `make test-vllm`")
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `apply_model` sends a function to the engine
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**os.environ, **fixed, **variables}


class Worker:
    """A process that answers `jobs` (see `vllm_worker.py`); `folder` keeps its files, logs and caches."""

    def __init__(self, folder: Path, jobs: list[dict]):
        self.folder = folder
        self.asked, self.answered, self.log = (folder / name for name in ("jobs.json", "answers.json", "log.txt"))
        self.asked.write_text(json.dumps(jobs))

    @contextlib.contextmanager
    def running(self, **variables: str) -> Iterator[subprocess.Popen]:
        """The process. Behind it, all that it has started is ended too (workers of tensor parallelism)."""
        command = [sys.executable, str(WORKER), str(self.asked), str(self.answered)]
        with started(command, self.folder, self.log, **variables) as process:
            yield process

    def wait(self, process: subprocess.Popen, seconds: float):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"vLLM did not finish in {seconds} s:\n{tail(self.log)}")

    def answers(self, process: subprocess.Popen) -> list[dict]:
        if not self.answered.exists():
            pytest.fail(f"vLLM ended with {process.returncode} and no answer:\n{tail(self.log)}")
        return json.loads(self.answered.read_text())

    def let_one_round_run(self, process: subprocess.Popen, index: int, seconds: float):
        """For jobs that are `paced`: lets round `index` run, and waits until it has."""
        process.stdin.write(b"\n")
        process.stdin.flush()
        give_up = time.monotonic() + seconds
        while not (self.folder / f"round-{index}").exists():
            if process.poll() is not None or time.monotonic() > give_up:
                pytest.fail(f"round {index} was not answered in {seconds} s:\n{tail(self.log)}")
            time.sleep(0.02)


@contextlib.contextmanager
def started(command: list[str], folder: Path, log: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, whose caches lie in `folder`, ended with all that it has started."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(HF_HOME=str(folder / "hf"), VLLM_CACHE_ROOT=str(folder / "vllm"), **variables),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdin.close()


def serve(folder: Path, jobs: list[dict], seconds: int) -> tuple[list[dict], str]:
    """Answers to `jobs` and the log of the process, which may take `seconds`."""
    worker = Worker(folder, jobs)
    with worker.running() as process:
        worker.wait(process, seconds)
    return worker.answers(process), worker.log.read_text()


def serve_in_turn(folder: Path, jobs: list[dict], seconds: int) -> list[dict]:
    """Answers to `jobs`, each in a process of its own, of which one runs at a time: round by round, for timings."""
    workers = []
    with contextlib.ExitStack() as stack:
        for index, job in enumerate(jobs):
            own = folder / f"process-{index}"
            own.mkdir()
            worker = Worker(own, [{**job, "paced": True}])
            workers.append((worker, stack.enter_context(worker.running(**HUGE_PAGES))))
        for index in range(len(jobs[0]["rounds"])):
            for worker, process in workers[:: 1 if index % 2 else -1]:
                worker.let_one_round_run(process, index, seconds)
        for worker, process in workers:
            worker.wait(process, seconds)
        return [worker.answers(process)[0] for worker, process in workers]


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-LINES_SHOWN:])
