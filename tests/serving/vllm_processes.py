"""vLLM in processes of its own, asked by files, with a time limit."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).parent / "vllm_worker.py"
LINES_SHOWN = 60


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


def serve(folder: Path, jobs: list[dict], seconds: int, **variables: str) -> tuple[list[dict], str]:
    """Answers to `jobs` (see `vllm_worker.py`) and the log of the process, which is killed after `seconds`."""
    asked, answered, log = folder / "jobs.json", folder / "answers.json", folder / "log.txt"
    answered.unlink(missing_ok=True)
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, str(WORKER), str(asked), str(answered)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(HF_HOME=str(folder / "hf"), **variables),
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"vLLM did not finish in {seconds} s:\n{tail(log)}")
        finally:
            stop_group(process)
    if not answered.exists():
        pytest.fail(f"vLLM ended with {process.returncode} and no answer:\n{tail(log)}")
    return json.loads(answered.read_text()), log.read_text()


def stop_group(process: subprocess.Popen):
    """Ends a process and all that it started, workers of tensor parallelism included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-LINES_SHOWN:])
