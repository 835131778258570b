# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Runs generated Python in a child process without network, new processes, or writing to files.

The child lowers its own limits (CPU time, memory, file size) and then gives up system calls by a seccomp filter that it
cannot take back; see `sandbox_child.py`. It can still read files that the user can read, but has nowhere to send them.
Where the filter does not exist (anything but Linux on x86-64 or 64-bit Arm), nothing is run.
"""

import platform
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .sandbox_child import FILTERS, UNAVAILABLE


CHILD = Path(__file__).parent / "sandbox_child.py"


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        passed: whether the program ran to its end.
        reason: why not: the last line of the traceback, `"timed out"`, or the exit code. Empty when passed.
    """

    passed: bool
    reason: str


def check_supported():
    """
    Raises:
        RuntimeError: where generated code cannot be confined.
    """
    if sys.platform != "linux" or platform.machine() not in FILTERS:
        raise RuntimeError(
            f"generated code runs only where it can be confined: Linux on {' or '.join(sorted(FILTERS))}, "
            f"this is {sys.platform} on {platform.machine()}; use `--predict_only` and score elsewhere"
        )


def run_python(program: str, seconds: float = 5.0, memory: int = 1 << 30) -> Outcome:
    """Runs a program in a confined child process.

    Args:
        program: Python source; it passes if it runs to its end without an exception and without leaving early.
        seconds: limit of wall-clock time; CPU time is limited to the same, rounded up.
        memory: limit of the child's address space in bytes.

    Raises:
        RuntimeError: if the child could not be confined; the program was not run then.
    """
    check_supported()
    # Only the child's own last statement knows the token, so `os._exit(0)` in the program does not count as passing.
    token = secrets.token_hex(16)
    # A file, so that the child's limit on file size also bounds what it writes to standard error.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-I", str(CHILD), str(memory), str(int(seconds) + 1)]
        try:
            done = subprocess.run(
                command,
                input=f"{token}\n{program}",
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},  # the child cannot start threads
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        errors.seek(0)
        lines = errors.read().decode("utf-8", errors="replace").strip().splitlines()
    if done.returncode == UNAVAILABLE:
        raise RuntimeError(f"the child process could not be confined: {' '.join(lines)}")
    if done.returncode == 0 and done.stdout == token:
        return Outcome(True, "")
    return Outcome(False, lines[-1] if lines else f"exit code {done.returncode}")
