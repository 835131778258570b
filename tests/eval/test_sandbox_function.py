# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A generated function and its tests, each in a process of its own: it passes by its answers, by nothing else."""

import json
import platform
import sys
from collections import OrderedDict, namedtuple
from decimal import Decimal
from fractions import Fraction
from http import HTTPStatus
from textwrap import dedent

import pytest

from modeling_attnres.eval.tasks.offline import humaneval, sandbox
from modeling_attnres.eval.tasks.offline.sandbox_child import FILTERS
from modeling_attnres.eval.tasks.offline.sandbox_program import pack, unpack


linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in FILTERS,
    reason="generated code is only run where Linux can confine it",
)
PASSED = sandbox.Outcome(True, "")


def check(source: str, tests: str, name: str = "f", setup: str = "", seconds: float = 20) -> sandbox.Outcome:
    return sandbox.check_function(source, name, setup, tests, seconds=seconds)


@linux
def test_a_function_is_called_from_another_process():
    source = "calls = []\ndef f(*args, **kwargs):\n    calls.append(args)\n    return len(calls), args, kwargs"
    tests = "assert f(1, [2], x={3}) == (1, (1, [2]), {'x': {3}})\nassert f()[0] == 2\nassert 'calls' not in globals()"
    assert check(source, tests) == PASSED
    assert not check(source, "assert f()[0] == 2").passed


@linux
def test_tests_use_what_their_setup_defines():
    source = "def helper(x):\n    return None\ndef f(x):\n    return 2 * x"
    setup = "def helper(x):\n    return x + x\ndef f(x): ..."
    assert check(source, "assert f(3) == helper(3)", setup=setup) == PASSED


@linux
def test_errors_of_a_function():
    source = """
        def f(x):
            if x: raise KeyError(x)
            raise type('Own', (Exception,), {})('text')
        """
    tests = """
        def raised(x):
            try: f(x)
            except Exception as error: return type(error).__name__, str(error)
        assert raised("name")[0] == "KeyError"
        assert raised("") == ("RuntimeError", "text")
        """
    assert check(dedent(source), dedent(tests)) == PASSED
    outcome = check("def f():\n    raise ValueError('too small')", "f()")
    assert outcome == sandbox.Outcome(False, "ValueError: too small")
    assert check("import nothing_like_this\ndef f(): pass", "f()").reason.startswith("ModuleNotFoundError")


TESTS = """
for x in (1, 2, 3):
    assert abs(f(x) - 2 * x) < 1e-9
assert list(map(f, (1, 2))) == [2, 4]
"""
CHEATS = {
    "equal to all": """
        class Any:
            __eq__ = __lt__ = __gt__ = __sub__ = __rsub__ = __abs__ = lambda *arguments: True
            __hash__ = None
        f = lambda x: Any()
        """,
    "a number with an opinion": """
        class Float(float):
            __sub__ = lambda *arguments: 0.0
            __eq__ = lambda *arguments: True
        f = lambda x: Float(0)
        """,
    "builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = Warning\nf = lambda x: 0",
    "the end of a loop": "def f(x): raise StopIteration",
    "leaving": "import os\ndef f(x): os._exit(0)",
    "leaving in style": "def f(x): raise SystemExit",
    "leaving at once": "import sys\nsys.exit(0)",
    "no function": "g = 1",
    "a number for a function": "f = 1",
    "the channel": """
        import os
        def f(x):
            for number in range(3, 400):
                try: os.write(number, b'[null, true]\\n' * 100)
                except OSError: pass
            return 0
        """,
    "the channel at once": """
        import os
        for number in range(3, 400):
            try: os.write(number, b'R' + bytes(32))
            except OSError: pass
        f = lambda x: 0
        """,
    "no JSON": "import json\njson.dumps = lambda x: '}{'\nf = lambda x: 0",
    "an unknown kind": """
        import json
        json.dumps = lambda x: '[null, ["eval", "1"]]'
        f = lambda x: 0
        """,
    "a deep answer": "import json\njson.dumps = lambda x: '[' * 100000\nf = lambda x: 0",
    "a large answer": "f = lambda x: 'x' * (1 << 25)",
    "an answer without end": "import json\njson.dumps = lambda x: '1' * (1 << 25)\nf = lambda x: 0",
    "the tests' own name": "import sys\ndef f(x):\n    return sys.modules['__main__'].check(x)",
    "half right": "f = lambda x: 2 * x if x < 3 else 0",
}


@linux
@pytest.mark.parametrize("name", CHEATS)
def test_a_function_passes_by_its_answers_only(name):
    source = dedent(CHEATS[name])
    compile(source, name, "exec")
    outcome = check(source, f"check = None\n{TESTS}")
    assert not outcome.passed
    assert outcome.reason not in ("", "timed out")


@linux
def test_the_control_of_the_cheats_passes():
    assert check("def f(x): return 2 * x", f"check = None\n{TESTS}") == PASSED


@linux
def test_time_of_a_function():
    assert check("def f():\n    while True: pass", "f()", seconds=0.5) == sandbox.Outcome(False, "timed out")
    assert check("def f():\n    while True: yield 1", "f()", seconds=0.5) == sandbox.Outcome(False, "timed out")


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            1,
            -(10**5000),
            1 << 63,
            -(1 << 63),
            (1 << 63) - 1,
            1.5,
            float("inf"),
            "text \u4e2d \ud800",
            1 + 2j,
            b"\x00\xff",
            bytearray(b"a"),
        ),
        *([], [1, [2, (3,)]], (), {1, "a"}, frozenset({(1, 2)}), {"a": 1, (1, 2): [None]}, range(1, 9, 2)),
        *(Fraction(1, 3), Decimal("1.10"), 0.1 + 0.2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_arrive_as_they_were_sent(value):
    arrived = unpack(json.loads(json.dumps(pack(value))))
    assert type(arrived) is type(value)
    assert arrived == value


def test_values_of_kinds_of_their_own():
    pair = namedtuple("pair", "a b")
    assert unpack(pack(OrderedDict(a=pair(1, 2)))) == {"a": (1, 2)}
    assert list(unpack(pack(x * x for x in range(3)))) == [0, 1, 4]
    assert unpack(pack(HTTPStatus.OK)) == 200
    with pytest.raises(TypeError, match="plain data, got object"):
        pack([object()])
    with pytest.raises(KeyError):
        unpack(["eval", "1"])


@linux
@pytest.mark.parametrize(
    "body",
    [
        "    class Any:\n        __eq__ = lambda *arguments: True\n    return Any()\n",
        "    return False\nimport builtins\nbuiltins.AssertionError = SystemExit\n",
        "    return False\nimport os\nos._exit(0)\n",
        "    return False\ndef check(candidate): pass\n",
        "    raise StopIteration\n",
    ],
)
def test_humanevals_answers_cannot_touch_its_tests(body):
    assert humaneval.run_tests(humaneval.problems()["test"][0], [body]) == {"pass@1": 0.0}
