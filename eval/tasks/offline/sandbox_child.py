# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The confinement of `sandbox.py`: `python -I -S sandbox_child.py MEMORY SECONDS`, which then becomes `sandbox_program.py`.

Everything is an allow-list. Landlock leaves the standard library and shared libraries to be read, nothing to be written,
and no other process to be looked into; a seccomp filter leaves the system calls that Python needs to compute. Neither
can be taken back. This takes ctypes, which the program must not have: so the last step replaces this process by a new
Python, whose confinement is there from its first instruction and whose standard library lacks ctypes.

System-call numbers: the kernel's `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator


UNAVAILABLE = 77  # exit code: the process could not be confined, nothing was run
PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_program.py")

# System calls by their numbers on x86-64 and on 64-bit Arm. Some take any arguments...
ALLOWED = {
    # what is open already
    **{"read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67)},
    **{"readv": (19, 65), "writev": (20, 66), "fstat": (5, 80), "getdents64": (217, 61)},
    # names of files
    **{"stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "getcwd": (79, 17)},
    **{"access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439)},
    **{"readlink": (89, None), "readlinkat": (267, 78)},
    # memory, which RLIMIT_AS bounds
    **{"mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233)},
    **{"brk": (12, 214)},
    # signals to itself: what handles them, not what sends them
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132)},
    **{"restart_syscall": (219, 128)},
    # the one thread
    **{"futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293)},
    **{"arch_prctl": (158, None), "sched_yield": (24, 124), "sched_getaffinity": (204, 123)},
    **{"exit": (60, 93), "exit_group": (231, 94)},
    # clocks
    **{"clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101)},
    **{"gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165)},
    # who and where it is
    **{"getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None)},
    **{"getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177)},
    **{"uname": (63, 160), "sysinfo": (99, 179), "getrlimit": (97, 163), "getrandom": (318, 278)},
}
# ...others only some, see `bpf_program`.
DESCRIPTORS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: no owners, locks, leases
CLOSING = (0x5450, 0x5451)  # FIONCLEX, FIOCLEX: no terminals
# machine: (place in the tables, audit architecture, flags of opening: O_CLOEXEC, O_NONBLOCK, O_NOCTTY, and O_DIRECTORY,
# O_NOFOLLOW, O_LARGEFILE, which differ)
FILTERS = {
    "x86_64": (0, 0xC000003E, 0o2004400 | 0o200000 | 0o400000 | 0o100000),
    "aarch64": (1, 0xC00000B7, 0o2004400 | 0o40000 | 0o100000 | 0o400000),
}

# Classic BPF: load a word, jump if equal / at least / any bit set, return.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER, SIGKILL = 1, 22, 38, 2, 9
AT_EMPTY_PATH = 0x1000
# Above every number that RLIMIT_NOFILE lets the program open: only this process can ever execute it, once.
EXECUTABLE, OPEN_FILES = 200, 64

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, READ_FILE, READ_DIR = 1, 4, 8
# Bits of struct landlock_ruleset_attr by the version that brought them: file system, network, other processes.
RIGHTS = {1: ((1 << 13) - 1, 0, 0), 2: (1 << 13, 0, 0), 3: (1 << 14, 0, 0)}
RIGHTS |= {4: (0, 0b11, 0), 5: (1 << 15, 0, 0), 6: (0, 0, 0b11)}

# Of the standard library: what holds other people's code, and what reaches into memory or starts other interpreters.
HIDDEN = ("site-packages", "dist-packages", "lib-dynload", "test", "ctypes", "_ctypes", "_test", "_xx", "xx")
MACHINE = platform.machine()
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", os.path.join(sys.base_prefix, "lib"))
LIBRARIES += (f"/lib/{MACHINE}-linux-gnu", f"/usr/lib/{MACHINE}-linux-gnu")
DATA = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/usr/lib/locale", "/dev/null")


def bpf_program(machine: str, executable: int = EXECUTABLE) -> bytes:
    """The filter: another architecture's calls kill; calls and arguments that the tables do not name fail.

    Args:
        executable: number of the file that `execveat` may run.
    """
    place, architecture, reading = FILTERS[machine]
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    # From 2**30 on, x86-64 numbers mean the same calls once more, for 32-bit pointers.
    code += [(AT_LEAST, 0, 1, 1 << 30), (RETURN, 0, 0, KILL)]
    allow, refuse = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE | errno.EPERM)

    def low(position: int) -> tuple:
        return LOAD, 0, 0, ARGUMENTS + 8 * position

    def high(position: int) -> tuple:
        return LOAD, 0, 0, ARGUMENTS + 8 * position + 4

    def one_of(values: tuple[int, ...]) -> list[tuple]:
        return [line for value in values for line in ((EQUAL, 0, 1, value), allow)]

    terminal = (RETURN, 0, 0, REFUSE | errno.ENOTTY)
    opening = [(ANY_BIT, 0, 1, ~reading & 0xFFFFFFFF), refuse, allow]
    only_null = [(EQUAL, 1, 0, 0), refuse]
    conditional = (
        ((2, None), [low(1), *opening]),  # open
        ((257, 56), [low(2), *opening]),  # openat
        ((72, 25), [low(1), *one_of(DESCRIPTORS), refuse]),  # fcntl
        ((16, 29), [low(1), *one_of(CLOSING), terminal]),  # ioctl
        # prlimit64: reads limits of its own
        ((302, 261), [low(0), *only_null, low(2), *only_null, high(2), *only_null, allow]),
        # execveat
        ((322, 281), [low(0), (EQUAL, 1, 0, executable), refuse, low(4), *one_of((AT_EMPTY_PATH,)), refuse]),
    )
    for numbers in ALLOWED.values():
        if numbers[place] is not None:
            code += [(EQUAL, 0, 1, numbers[place]), allow]
    for numbers, lines in conditional:
        if numbers[place] is not None:
            code += [(EQUAL, 0, len(lines), numbers[place]), *lines]
    code.append(refuse)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def libc():
    """The C library; nothing of it is touched by importing this module, on whatever system."""
    return ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """
    Raises:
        OSError: if a C function returned -1; names what for.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value, what: str, *more):
    arguments = [ctypes.c_ulong(part) if isinstance(part, int) else part for part in (value, *more)]
    arguments += [ctypes.c_ulong(0)] * (4 - len(arguments))
    check(libc().prctl(option, *arguments), what)


def give_up_system_calls(executable: int):
    """
    Raises:
        OSError: if the kernel refuses the filter.
    """
    code = bpf_program(MACHINE, executable)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and their address at the next aligned place.
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    header = ctypes.create_string_buffer(program, len(program))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, "seccomp", header)


def give_up_capabilities():
    """Makes root an ordinary user, for the limits to hold."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    check(libc().capset(header, ctypes.create_string_buffer(24)), "capabilities")


def visible_files() -> Iterator[tuple[str, int]]:
    """Paths and what may be done with them: the standard library, shared libraries, time zones."""
    for folder in filter(os.path.isdir, sys.path):  # under -I -S nothing but the standard library
        yield folder, READ_DIR
        for entry in os.scandir(folder):
            if not entry.name.startswith(HIDDEN):
                yield entry.path, READ_FILE | READ_DIR
    for folder in filter(os.path.isdir, LIBRARIES):
        yield from ((entry.path, READ_FILE) for entry in os.scandir(folder) if ".so" in entry.name)
    yield from ((path, READ_FILE | READ_DIR) for path in (*DATA, PROGRAM))
    # What this very process runs: the interpreter, the loader, and libraries wherever they are.
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if line.count("/")}
    own_module = ("_ctypes", "libffi")
    for path in paths:
        if not os.path.basename(path).startswith(own_module):
            yield path, READ_FILE | EXECUTE


def give_up_files():
    """
    Raises:
        OSError: if the kernel has no Landlock.
    """
    system_call = libc().syscall
    version = check(system_call(CREATE_RULESET, None, ctypes.c_size_t(0), 1), "Landlock")
    handled = [0, 0, 0]
    for since, bits in RIGHTS.items():
        if since <= version:
            handled = [a | b for a, b in zip(handled, bits)]
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", *handled))
    ruleset = check(system_call(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "Landlock")
    for path, rights in visible_files():
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not there, and so not to be read either
            continue
        if not os.path.isdir(path):
            rights &= ~READ_DIR
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, opened))
        check(system_call(ADD_RULE, ruleset, 1, rule, 0), f"Landlock rule for {path}")
        os.close(opened)
    check(system_call(RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def main():
    import fcntl
    import resource

    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    try:
        interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        opened = os.open(interpreter, os.O_PATH | os.O_CLOEXEC)
        executable = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, EXECUTABLE)
        os.close(opened)
        prctl(PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
        give_up_files()
        for limit, value in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, 1 << 20),  # what a traceback may take
            (resource.RLIMIT_NOFILE, OPEN_FILES),
            (resource.RLIMIT_NPROC, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        give_up_capabilities()
        prctl(PR_SET_PDEATHSIG, SIGKILL, "signal at the parent's end")
        give_up_system_calls(executable)
        os.execve(executable, [interpreter, "-I", "-S", PROGRAM], os.environ)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(UNAVAILABLE)


if __name__ == "__main__":
    main()
