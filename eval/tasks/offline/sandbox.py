# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Runs generated Python in processes that can compute and nothing else.

A confined process (see `sandbox_child.py`) can read the standard library, and no other file; it can write to no file,
reach no network, no terminal and no other process, neither by signals nor by looking into its memory; its time, memory,
processes, open files and output are bounded. Where the system cannot give all of that (anything but Linux on x86-64 or
64-bit Arm with seccomp and Landlock), nothing is run.

[`run_python`] says whether a program came to its end, which a program that contains its own tests can bring about by
tampering with them. [`check_function`] keeps the tests, and the verdict, in a process of their own.
"""

import json
import os
import platform
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .sandbox_child import FILTERS, UNAVAILABLE
from .sandbox_program import READY


CHILD = Path(__file__).parent / "sandbox_child.py"
SECONDS_TO_START = 60
REASON_BYTES, REASON_CHARACTERS = 1 << 16, 500


class ConfinementError(RuntimeError):
    """Generated code cannot be confined here, and was not run; the message is meant for the user."""


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        passed: whether the program ran to its end.
        reason: why not: the last line of the traceback, `"timed out"`, or the exit code. Empty when passed.
    """

    passed: bool
    reason: str


def check_platform():
    """
    Raises:
        ConfinementError: on a system for which there is no confinement.
    """
    if sys.platform != "linux" or platform.machine() not in FILTERS:
        raise ConfinementError(
            f"generated code runs only where it can be confined: Linux on {' or '.join(sorted(FILTERS))}, "
            f"this is {sys.platform} on {platform.machine()}; use `--predict_only` and score elsewhere"
        )


def check_supported():
    """Confines one process, to see whether it can be done.

    Raises:
        ConfinementError: where generated code cannot be confined.
    """
    check_platform()
    run_python("")


@dataclass
class _Child:
    """A process that confines itself and then runs a request; `results` is its channel's end on this side."""

    process: subprocess.Popen
    results: int
    errors: IO[bytes]

    def read(self, count: int, deadline: float) -> bytes:
        """Up to `count` bytes of results, fewer at their end.

        Raises:
            TimeoutError: at the deadline.
        """
        data, poll = b"", select.poll()
        poll.register(self.results, select.POLLIN)
        while len(data) < count:
            if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise TimeoutError
            part = os.read(self.results, count - len(data))
            if not part:
                break
            data += part
        return data

    def check_ready(self):
        """
        Raises:
            ConfinementError: if the process could not be confined; it has run nothing then.
        """
        try:
            ready = self.read(len(READY), time.monotonic() + SECONDS_TO_START) == READY
        except TimeoutError:
            ready = False
        if not ready:
            self.process.kill()
            code = self.process.wait()
            line = self.last_line() if code == UNAVAILABLE else f"exit code {code} {self.last_line()}".strip()
            raise ConfinementError(f"the child process could not be confined ({line}), so generated code is not run")

    def outcome(self, token: bytes, deadline: float) -> Outcome:
        """Whether exactly the token comes back, and then the end."""
        try:
            data = self.read(len(token) + 1, deadline)
            if len(data) > len(token):
                self.process.kill()
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            return Outcome(False, "timed out")
        if code == 0 and secrets.compare_digest(data, token):
            return Outcome(True, "")
        return Outcome(False, self.last_line() or f"exit code {code}")

    def last_line(self) -> str:
        """Of what the process wrote to standard error."""
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - REASON_BYTES))
        lines = self.errors.read().decode("utf-8", errors="replace").strip().splitlines()
        return lines[-1][:REASON_CHARACTERS] if lines else ""


@contextmanager
def _child(request: dict, seconds: float, memory: int, channel: tuple[int, ...] = ()) -> Iterator[_Child]:
    """Starts a confined process, and ends it.

    Args:
        request: see `sandbox_program.py`; the number of the channel of results is added.
        channel: files that the process keeps open, besides.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # A file, so that the child's limit on file size also bounds what it writes to standard error.
        errors = stack.enter_context(tempfile.TemporaryFile())
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        try:
            requests = stack.enter_context(tempfile.TemporaryFile())
            requests.write(json.dumps({**request, "result": writing}).encode())
            requests.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), str(memory), str(int(seconds) + 2)],
                stdin=requests,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                pass_fds=(writing, *channel),
                start_new_session=True,  # and so without a terminal
            )
        finally:
            os.close(writing)
        try:
            yield _Child(process, reading, errors)
        finally:
            process.kill()
            process.wait()


def run_python(program: str, seconds: float = 5.0, memory: int = 1 << 30) -> Outcome:
    """Runs a program in a confined process.

    Args:
        program: Python source, of the standard library only; it passes if it runs to its end without an exception and
            without leaving early.
        seconds: limit of wall-clock time; CPU time, start-up included, is limited to one or two more.
        memory: limit of the child's address space in bytes.

    Raises:
        ConfinementError: if the child could not be confined; the program was not run then.
    """
    check_platform()
    token = secrets.token_bytes(32)
    with _child({"program": program, "token": token.hex()}, seconds, memory) as child:
        child.check_ready()
        return child.outcome(token, time.monotonic() + seconds)


def check_function(
    source: str, name: str, setup: str, tests: str, seconds: float = 5.0, memory: int = 1 << 30
) -> Outcome:
    """Tests a generated function that cannot reach its tests: both run confined, in processes that exchange plain data.

    Only arguments and values cross, as numbers, texts and containers of them. So a function passes by its answers; it
    cannot replace what the tests use, answer with an object that claims to equal everything, or read what is expected.
    What a function does to its arguments, the tests do not see.

    Args:
        source: Python source that defines the function.
        name: the function's.
        setup: trusted source, run before the tests, for other names that they use; may define `name` too.
        tests: trusted source; calls `name`.
        seconds: limit of wall-clock time for all of it; CPU time as in [`run_python`], for each process.
        memory: limit of each process's address space in bytes.

    Raises:
        ConfinementError: if a process could not be confined; nothing generated was run then.
    """
    check_platform()
    token = secrets.token_bytes(32)
    with ExitStack() as stack:
        pipes = [os.pipe(), os.pipe()]
        ends = {end for pipe in pipes for end in pipe}
        stack.callback(lambda: [os.close(end) for end in ends])
        (calls, calling), (answers, answering) = pipes
        sides = (
            ({"program": tests, "token": token.hex(), "setup": setup}, (answers, calling)),
            ({"program": source, "token": None}, (calls, answering)),
        )
        tester, function = (
            stack.enter_context(_child({**request, "name": name, "channel": own}, seconds, memory, own))
            for request, own in sides
        )
        while ends:  # each process sees the other's end only if nobody else holds the pipe
            os.close(ends.pop())
        tester.check_ready()
        function.check_ready()
        outcome = tester.outcome(token, time.monotonic() + seconds)
        if outcome.passed or outcome.reason == "timed out":
            return outcome
        # Where the function's process fell, its own words say more.
        return Outcome(False, function.last_line() or outcome.reason)
